"""tinyllm: a self-contained GPT decoder runtime. The same request gives the same bits, however it is scheduled.

>>> from tinyllm import LLM, SamplingParams
>>> llm = LLM("tales-4m")
>>> llm.generate("Once upon a time", SamplingParams(temperature=0))[0].outputs[0].text
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllm.engine.snapshot import Snapshot as Snapshot
    from tinyllm.errors import (
        ConfigError as ConfigError,
        DeviceError as DeviceError,
        DownloadError as DownloadError,
        InvalidRequestError as InvalidRequestError,
        ModelFileError as ModelFileError,
        ModelNotFoundError as ModelNotFoundError,
        RecordingError as RecordingError,
        SnapshotError as SnapshotError,
        TinyLLMError as TinyLLMError,
        TokenizerError as TokenizerError,
    )
    from tinyllm.llm import LLM as LLM
    from tinyllm.outputs import (
        CompletionOutput as CompletionOutput,
        Logprob as Logprob,
        RequestOutput as RequestOutput,
        ScoreOutput as ScoreOutput,
        StreamChunk as StreamChunk,
    )
    from tinyllm.sampling_params import SamplingParams as SamplingParams
    from tinyllm.session import Session as Session
    from tinyllm.structured_output import StructuredOutput as StructuredOutput

__version__ = "0.1.0"

_ERRORS = (
    "ConfigError",
    "DeviceError",
    "DownloadError",
    "InvalidRequestError",
    "ModelFileError",
    "ModelNotFoundError",
    "RecordingError",
    "SnapshotError",
    "TinyLLMError",
    "TokenizerError",
)
_OUTPUTS = ("CompletionOutput", "Logprob", "RequestOutput", "ScoreOutput", "StreamChunk")
_MODULES = {
    "LLM": "tinyllm.llm",
    "SamplingParams": "tinyllm.sampling_params",
    "Session": "tinyllm.session",
    "Snapshot": "tinyllm.engine.snapshot",
    "StructuredOutput": "tinyllm.structured_output",
    **dict.fromkeys(_ERRORS, "tinyllm.errors"),
    **dict.fromkeys(_OUTPUTS, "tinyllm.outputs"),
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `import tinyllm` alone loads neither numba nor tokenizers."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
