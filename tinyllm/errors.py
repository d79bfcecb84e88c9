"""The errors a user can meet, in one tree. Each message is one line that names the mistake.

Programmer's mistakes are assertions; these classes are for mistakes in requests, files and settings.
"""


def reason(error: Exception) -> str:
    """What the system says of a failed file operation, without the number and the path that OSError adds."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class TinyLLMError(Exception):
    """Base of every error that tinyllm raises on purpose. The CLI prints its message and exits with 2."""


class InvalidRequestError(TinyLLMError, ValueError):
    """A request that cannot be served: bad token ids, sampling parameters, prompt or stop conditions."""


class ConfigError(TinyLLMError, ValueError):
    """A model or engine configuration that is missing a field, has an unknown one, or contradicts itself."""


class ModelNotFoundError(TinyLLMError, LookupError):
    """The model named by the user is neither a registered name, a file, a folder nor a reachable hub id."""


class ModelFileError(TinyLLMError, ValueError):
    """A model file that is damaged, hostile or of an unsupported kind."""


class TokenizerError(TinyLLMError, ValueError):
    """A tokenizer or chat template that cannot be built, or a text that it cannot encode."""


class DownloadError(TinyLLMError, OSError):
    """A download that failed, was interrupted, or does not match its pinned digest."""


class DeviceError(TinyLLMError, RuntimeError):
    """A device that this machine does not have, or that tinyllm does not know."""


class SnapshotError(TinyLLMError, ValueError):
    """A snapshot that is damaged, hostile, made by another model, or larger than the KV cache."""


class RecordingError(TinyLLMError, ValueError):
    """A recording that is damaged, foreign, cannot be replayed, or cannot be written."""
