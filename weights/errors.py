"""The one error of this package."""

__all__ = ["WeightsError", "quoted"]


class WeightsError(ValueError):
    """A model file that is damaged, hostile or unsupported; the message is one line naming file and cause."""


def quoted(text: object) -> str:
    """A value from an untrusted file for an error message: printable ASCII on one line, at most 80 characters."""
    if isinstance(text, (str, bytes)):
        shown = ascii(text[:80])
    elif isinstance(text, (bool, int, float, type(None))):
        shown = str(text)
    else:
        return f"a {type(text).__name__}"  # may be too large or too deep to print
    return shown if len(shown) <= 80 else shown[:77] + "..."
