"""Frozen, validated configuration: what the model is, and how the engine runs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tinyllm.errors import ConfigError

__all__ = ["ACTIVATION_DTYPES", "COMPUTE_DTYPES", "KV_DTYPES", "EngineConfig", "ModelConfig", "RopeConfig"]

KV_DTYPES = ("f32", "f16", "bf16", "int8", "fp8")
COMPUTE_DTYPES = ("f32", "f16", "bf16")
ACTIVATION_DTYPES = ("f32", "int8")
_ACTIVATIONS = ("silu", "gelu_tanh")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_real(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 1000  # larger ones have no float
    return isinstance(value, float) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv:2104.09864), rotating the two halves of a head (GPT-NeoX order).

    Attributes:
        theta: the base of the frequencies, theta ** (-2i / rotary_dim).
        rotary_dim: how many leading dimensions of a head are rotated.
        scaling: "none"; "linear" divides positions by `factor`; "llama3" is Llama 3.1's smoothed scaling.
        freq_divisors: (rotary_dim / 2,) divisors of the frequencies, as GGUF stores them; overrides `scaling`.
    """

    theta: float = 10000.0
    rotary_dim: int
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    freq_divisors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _require(_is_real(self.theta) and self.theta > 0, f"rope theta must be positive, not {self.theta!r}")
        _require(
            _is_int(self.rotary_dim, 2, 1 << 16) and self.rotary_dim % 2 == 0,
            f"rotary_dim must be even and positive, not {self.rotary_dim!r}",
        )
        _require(self.scaling in ("none", "linear", "llama3"), f"rope scaling {self.scaling!r} is not supported")
        _require(_is_real(self.factor) and self.factor > 0, f"rope factor must be positive, not {self.factor!r}")
        _require(
            _is_real(self.low_freq_factor)
            and _is_real(self.high_freq_factor)
            and 0 < self.low_freq_factor < self.high_freq_factor,
            "rope scaling needs 0 < low_freq_factor < high_freq_factor",
        )
        _require(_is_int(self.original_max_position, 1, 1 << 40), "rope original_max_position must be positive")
        if self.freq_divisors is not None:
            _require(len(self.freq_divisors) == self.rotary_dim // 2, "rope_freqs has the wrong length")
            _require(all(_is_real(d) and d > 0 for d in self.freq_divisors), "rope_freqs must be finite and positive")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder, in the field's words; every architecture fills the same fields.

    Attributes:
        architecture: "llama", "mistral", "qwen2", "qwen3", "gpt2" or "gemma3".
        max_position: the longest sequence, in tokens, that the model was made for.
        rope: None where positions are learned (gpt2).
        local_rope: the sliding layers' own RoPE where it differs (gemma3).
        sliding_window: a query at p sees keys p - sliding_window < j <= p, in layers marked sliding.
        sliding_layers: (num_layers,) which layers slide; empty means none.
        attention_scale: the factor on q.k before the softmax.
        attention_softcap, logit_softcap: cap * tanh(x / cap); 0 for none.
        embedding_scale: the factor on token embeddings (gemma: sqrt(hidden_size)).
        qkv_bias, attention_output_bias, mlp_bias: whether those linear layers add a bias.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    attention_scale: float
    activation: str = "silu"
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, high in (
            ("vocab_size", 1 << 24),
            ("hidden_size", 1 << 20),
            ("intermediate_size", 1 << 22),
            ("num_layers", 1 << 12),
            ("num_heads", 1 << 12),
            ("num_kv_heads", 1 << 12),
            ("head_dim", 1 << 12),
            ("max_position", 1 << 40),
        ):
            value = getattr(self, name)
            _require(_is_int(value, 1, high), f"{name} must be an integer from 1 to {high}, not {value!r}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) is not divisible by num_kv_heads ({self.num_kv_heads})",
        )
        _require(_is_real(self.norm_eps) and 0 <= self.norm_eps < 1, f"norm_eps {self.norm_eps!r} is not in [0, 1)")
        _require(
            _is_real(self.attention_scale) and self.attention_scale > 0,
            f"attention_scale must be positive, not {self.attention_scale!r}",
        )
        _require(self.activation in _ACTIVATIONS, f"activation {self.activation!r} is not supported")
        for name in ("attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            _require(_is_real(value) and value >= 0, f"{name} must be 0 or positive, not {value!r}")
        _require(_is_real(self.embedding_scale), f"embedding_scale {self.embedding_scale!r} is not a number")
        _require(
            self.sliding_window is None or _is_int(self.sliding_window, 1, 1 << 40),
            f"sliding_window must be positive, not {self.sliding_window!r}",
        )
        _require(
            len(self.sliding_layers) in (0, self.num_layers),
            f"{len(self.sliding_layers)} layer types for {self.num_layers} layers",
        )
        _require(
            not any(self.sliding_layers) or self.sliding_window is not None,
            "sliding layers need a sliding_window",
        )
        for rope in (self.rope, self.local_rope):
            _require(rope is None or rope.rotary_dim <= self.head_dim, "rotary_dim is larger than head_dim")
        ids = (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,)))
        _require(
            all(_is_int(i, 0, self.vocab_size - 1) for i in ids),
            f"a bos or eos token id lies outside the vocabulary of {self.vocab_size}",
        )

    def window_of_layer(self, layer: int) -> int | None:
        """The sliding window of a layer, in tokens, or None where it attends to everything."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else None


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine runs: all of it optional.

    Attributes:
        max_batch_tokens: the token budget of one step; prompts are prefilled in chunks of at most this.
        max_num_seqs: how many sequences may run at once.
        max_stall: a step may take about this many times as long as the decoding in it would alone; prompts are then
            prefilled in as small chunks as that takes (see tinyllm.step_cost). None: in chunks of max_batch_tokens.
        block_size: tokens per KV block; a multiple of 16 on the cpu backend, a power of two up to 256 on the GPU.
        num_blocks: KV blocks to reserve; None sizes the cache from the model and the free memory.
        kv_dtype: storage of keys and values: "f32", "f16", "bf16", or with a scale for each token and head "int8" and
            on the GPU "fp8"; "auto" is what the backend computes attention in: on the CPU f32, or with int8
            activations bf16 where its AMX multiplies that, else f16.
        max_model_len: the longest prompt plus output, in tokens; None means the model's own limit.
        num_threads: CPU threads; None means all that this process may use.
        device: "auto" (a GPU if there is one, else the CPU), "cpu", "cuda", "cuda-emulated" or "reference".
        compute_dtype: what linear layers multiply in on the GPU: "f32", "f16" or "bf16"; "auto" follows the weights'
            storage: exact float32 for F32 weights, tensor cores in f16 or bf16 for all others. Sums are float32.
        activations: what quantised weights are multiplied with on the CPU: "f32", or "int8", which is faster and less
            exact: activations are rounded to eight bits per 32 values. The same bits are promised either way.
        cuda_graphs: replay decode steps as CUDA graphs instead of launching kernel by kernel.
        fast_matmul: cuBLAS for the GPU's linear layers, without graphs. It gives up the same bits: they depend on the
            batch then.
        prefix_caching: keep the keys and values of finished requests for others that begin with the same tokens.
        debug_checks: verify the block manager's invariants after every step.
    """

    max_batch_tokens: int = 512
    max_num_seqs: int = 256
    max_stall: float | None = None
    block_size: int = 16
    num_blocks: int | None = None
    kv_dtype: str = "auto"
    max_model_len: int | None = None
    num_threads: int | None = None
    device: str = "auto"
    compute_dtype: str = "auto"
    activations: str = "f32"
    cuda_graphs: bool = True
    fast_matmul: bool = False
    prefix_caching: bool = True
    debug_checks: bool = False

    def __post_init__(self) -> None:
        for name, high in (("max_batch_tokens", 1 << 20), ("max_num_seqs", 1 << 16), ("block_size", 1 << 12)):
            value = getattr(self, name)
            _require(_is_int(value, 1, high), f"{name} must be an integer from 1 to {high}, not {value!r}")
        for name, high in (("num_blocks", (1 << 31) - 1), ("max_model_len", 1 << 40), ("num_threads", 1 << 12)):
            value = getattr(self, name)
            _require(
                value is None or _is_int(value, 1, high),
                f"{name} must be an integer from 1 to {high}, not {value!r}",
            )
        _require(
            self.max_stall is None or (_is_real(self.max_stall) and 1 < self.max_stall <= 1e6),
            f"max_stall must be a number above 1, not {self.max_stall!r}",
        )
        for name, known in (("kv_dtype", KV_DTYPES), ("compute_dtype", COMPUTE_DTYPES)):
            value = getattr(self, name)
            allowed = (*known, "auto")
            _require(value in allowed, f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        _require(
            self.activations in ACTIVATION_DTYPES,
            f"activations must be one of {', '.join(ACTIVATION_DTYPES)}, not {self.activations!r}",
        )
        _require(isinstance(self.device, str), f"device must be a string, not {self.device!r}")
        for name in ("cuda_graphs", "fast_matmul", "prefix_caching", "debug_checks"):
            _require(isinstance(getattr(self, name), bool), f"{name} must be True or False")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """Builds a config from keywords. Raises ConfigError naming an unknown one."""
        known = [f.name for f in fields(cls)]
        for name in options:
            _require(name in known, f"unknown engine option {name!r}; the options are {', '.join(known)}")
        return cls(**options)
