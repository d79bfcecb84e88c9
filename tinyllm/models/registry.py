"""From a checkpoint to a model: which architecture it is, what it needs, and its parameters packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import Backend
from tinyllm.config import ModelConfig
from tinyllm.errors import ConfigError
from tinyllm.models import gemma3, gpt2, llama, mistral, qwen2, qwen3
from tinyllm.models.layers import Decoder
from tinyllm.models.model import Model
from tinyllm.models.parameters import Adaptation, ParameterLoader, ParameterPlan, Parameters, Source
from tinyllm.models.settings import Settings
from weights import Checkpoint
from weights.errors import quoted
from weights.names import name_map

__all__ = ["load_model", "model_config", "parameters_nbytes"]

Adapt = Callable[[ModelConfig], dict[str, Adaptation]]


@dataclass(frozen=True)
class Architecture:
    """How a file's architecture is read: its configuration and the conventions of its tensors."""

    model: Callable[[ModelConfig, Backend, Parameters], Decoder]
    from_huggingface: Callable[[Settings], ModelConfig] | None
    from_gguf: Callable[[Settings, Checkpoint], ModelConfig] | None
    adapt_huggingface: Adapt | None = None
    adapt_gguf: Adapt | None = None


_LLAMA = Architecture(llama.Llama, llama.from_huggingface, llama.from_gguf, adapt_gguf=llama.adapt_gguf)
_GEMMA3 = Architecture(
    gemma3.Gemma3, gemma3.from_huggingface, gemma3.from_gguf, adapt_huggingface=gemma3.adapt_huggingface
)

ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": Architecture(llama.Llama, mistral.from_huggingface, None),  # GGUF files call it llama
    "qwen2": Architecture(llama.Llama, qwen2.from_huggingface, qwen2.from_gguf),
    "qwen3": Architecture(qwen3.Qwen3, qwen3.from_huggingface, qwen3.from_gguf),
    "gpt2": Architecture(gpt2.GPT2, gpt2.from_huggingface, gpt2.from_gguf, adapt_huggingface=gpt2.adapt_huggingface),
    "gemma3": _GEMMA3,
}
_ALIASES = {"gemma3_text": "gemma3"}


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """The shape of a checkpoint's model, from its config.json or GGUF metadata.

    Raises ConfigError where a field is missing, is of the wrong type or range, contradicts another, or asks for
    something that is not supported.
    """
    is_gguf = checkpoint.kind == "gguf"
    source = str(checkpoint.path if is_gguf else checkpoint.path / "config.json")
    settings = Settings(checkpoint.metadata, source)
    field = "general.architecture" if is_gguf else "model_type"
    name = settings.text(field)
    architecture = ARCHITECTURES.get(_ALIASES.get(name, name))
    try:
        if is_gguf and architecture is not None and architecture.from_gguf is not None:
            return architecture.from_gguf(Settings(checkpoint.metadata, source, f"{name}."), checkpoint)
        if not is_gguf and architecture is not None and architecture.from_huggingface is not None:
            config = architecture.from_huggingface(settings)
            return _check_tie(config, checkpoint)
    except ConfigError as e:
        if str(e).startswith(source):
            raise
        raise ConfigError(f"{source}: {e}") from e
    raise settings.error(f"{field} {quoted(name)} is not supported; {', '.join(ARCHITECTURES)} are")


def parameters_nbytes(checkpoint: Checkpoint, config: ModelConfig, backend: Backend) -> int:
    """Bytes that the loaded model will hold, exactly. Reads the tensor directory alone. Raises ModelFileError."""
    return _plan(_source(checkpoint, config), config, backend).nbytes


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    backend: Backend,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Checks all names and shapes, then packs the tensors one by one, letting go of each one's file pages.

    progress: called with the bytes packed so far and in total. Raises ModelFileError where tensors are missing,
    left over or of the wrong shape, before anything is packed.
    """
    source = _source(checkpoint, config)
    total_nbytes = _plan(source, config, backend).nbytes
    loader = ParameterLoader(source, backend, total_nbytes, progress)
    model = ARCHITECTURES[config.architecture].model(config, backend, loader)
    assert loader.nbytes == total_nbytes, f"{loader.nbytes} bytes were packed where {total_nbytes} were planned"
    model.nbytes = loader.nbytes
    return model


def _check_tie(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """A tied LM head may come as a tensor too; it is one of its own where it differs from the embedding.

    That is transformers' rule. Both are read only where both are there.
    """
    names = name_map(checkpoint.kind, config.architecture, checkpoint.tensors)
    embedding, head = (checkpoint.tensors.get(names.file_name(name)) for name in ("embedding", "lm_head"))
    if not config.tie_word_embeddings or embedding is None or head is None:
        return config
    same = embedding.shape == head.shape and embedding.dtype == head.dtype and _equal(embedding.data, head.data)
    checkpoint.release(embedding)
    checkpoint.release(head)
    return config if same else replace(config, tie_word_embeddings=False)


def _equal(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    """Whether two arrays of one size hold the same bytes, without a temporary of their size."""
    step = 1 << 24
    return all(np.array_equal(a[i : i + step], b[i : i + step]) for i in range(0, len(a), step))


def _source(checkpoint: Checkpoint, config: ModelConfig) -> Source:
    architecture = ARCHITECTURES[config.architecture]
    adapt = architecture.adapt_gguf if checkpoint.kind == "gguf" else architecture.adapt_huggingface
    names = name_map(checkpoint.kind, config.architecture, checkpoint.tensors)
    return Source(checkpoint, names, adapt(config) if adapt is not None else {})


def _plan(source: Source, config: ModelConfig, backend: Backend) -> ParameterPlan:
    plan = ParameterPlan(source, backend)
    ARCHITECTURES[config.architecture].model(config, backend, plan)
    if config.rope is not None and config.rope.freq_divisors is not None:
        plan.use("rope_divisors")
    if source.checkpoint.kind == "huggingface" and config.tie_word_embeddings:
        plan.use("lm_head")  # a copy of the embedding, see _check_tie
    plan.check(config.architecture)
    return plan
