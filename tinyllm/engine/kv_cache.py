"""How large the KV cache, the step's row counts and the longest sequence are: decided once, before anything loads."""

from __future__ import annotations

from tinyllm.backends.base import Backend, KVCacheSpec
from tinyllm.config import EngineConfig, ModelConfig
from tinyllm.errors import ConfigError

__all__ = ["kv_cache_spec", "max_logits_rows", "max_sequence_len", "scratch_sizes"]

LOGITS_ROWS = 64  # rows of the vocabulary's width held at once
DEFAULT_SEQUENCES = 8  # a cache sized by default has room for this many of the longest sequences
DEFAULT_SHARE = 4  # and takes at most a quarter of the free memory


def max_sequence_len(model: ModelConfig, engine: EngineConfig) -> int:
    """The longest prompt plus output, in tokens, as model and options allow. Raises ConfigError."""
    if engine.max_model_len is None:
        return model.max_position
    if engine.max_model_len > model.max_position:
        raise ConfigError(f"max_model_len {engine.max_model_len} exceeds the model's {model.max_position} positions")
    return engine.max_model_len


def max_logits_rows(engine: EngineConfig) -> int:
    """How many rows go through the LM head at once."""
    return min(LOGITS_ROWS, engine.max_batch_tokens)


def scratch_sizes(
    model: ModelConfig, max_batch_tokens: int, max_context: int
) -> tuple[int, int, int, int, int, int, int]:
    """What Backend.workspace_nbytes and reserve want to know. max_context: columns of block tables, in tokens."""
    max_in_features = max(model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim)
    return (
        *(max_batch_tokens, max_in_features),
        *(model.num_heads, model.num_kv_heads, model.head_dim),
        min(max_context, model.max_position),
        model.vocab_size,
    )


def kv_cache_spec(
    model: ModelConfig, engine: EngineConfig, backend: Backend, available_nbytes: int | None = None
) -> KVCacheSpec:
    """The cache to reserve: `num_blocks` if given, else sized from the model and the memory available (bytes).

    Pages of the cache count as resident only once a token was written there. Raises ConfigError if the blocks that were
    asked for exceed the memory.
    """

    def spec(num_blocks: int) -> KVCacheSpec:
        return KVCacheSpec(
            num_layers=model.num_layers,
            num_blocks=num_blocks,
            block_size=engine.block_size,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=backend.default_kv_dtype(model.head_dim) if engine.kv_dtype == "auto" else engine.kv_dtype,
        )

    if engine.num_blocks is not None and engine.num_blocks * engine.block_size >= 1 << 31:
        raise ConfigError(f"{engine.num_blocks} blocks of {engine.block_size} tokens are more than 2**31 slots")
    available = backend.available_nbytes() if available_nbytes is None else available_nbytes
    block_nbytes = backend.kv_cache_nbytes(spec(2)) - backend.kv_cache_nbytes(spec(1))
    if engine.num_blocks is not None:
        needed = backend.kv_cache_nbytes(spec(engine.num_blocks))
        if needed > available:
            raise ConfigError(
                f"{engine.num_blocks} KV blocks take {needed / 1e6:.0f} MB, more than the {available / 1e6:.0f} MB free"
            )
        return spec(engine.num_blocks)
    per_sequence = -(-max_sequence_len(model, engine) // engine.block_size)
    wanted = min(per_sequence * min(DEFAULT_SEQUENCES, engine.max_num_seqs), ((1 << 31) - 1) // engine.block_size)
    share = available // DEFAULT_SHARE // block_nbytes
    return spec(max(1, min(wanted, max(share, min(per_sequence, available // 2 // block_nbytes)))))
