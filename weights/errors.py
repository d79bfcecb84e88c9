"""The one error of this package."""


class WeightsError(ValueError):
    """A model file that is damaged, hostile, or uses something unsupported; the message names file and cause."""
