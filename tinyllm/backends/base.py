"""The ops that every backend provides, and the arrays that pass between the engine, the models and the ops.

Letters: T tokens of a step, S sequences, H query heads, KH key/value heads, D head dimension, NB blocks of BS slots,
MB the longest block table, M hidden size, I intermediate size, V vocabulary. Activations are float32, C-contiguous
unless said otherwise. An op given `out` writes there and returns it; it may alias an input only where said.

Same-bits rules that every op keeps: each output row is a function of its own inputs alone, with an order of
floating-point operations that depends on nothing but the reduced axis's length and the stored dtype: never on T, S,
the block numbers, the chunking, or the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tinyllm.step_cost import StepCost
from weights import Tensor

__all__ = [
    "NO_WINDOW",
    "SPLIT_KEYS",
    "Backend",
    "Batch",
    "BatchExtent",
    "F32Array",
    "I32Array",
    "KVCache",
    "KVCacheSpec",
    "StepRunner",
    "Weight",
]

F32Array = NDArray[np.float32]  # on a device other than the host: the device's own arrays, alike in all that is used
I32Array = NDArray[np.int32]

SPLIT_KEYS = 256  # attention partials cover this many keys, at fixed absolute positions
NO_WINDOW = (1 << 31) - 1


@dataclass(frozen=True)
class BatchExtent:
    """What the host knows of a batch, wherever its arrays are. It decides what is launched, never a result.

    Attributes:
        max_query_len: the most tokens of one sequence in this step.
        max_seq_len: no sequence is longer than this.
        sink_window: the narrowest window of a sequence with sinks; NO_WINDOW if there is none.
    """

    max_query_len: int
    max_seq_len: int
    sink_window: int = NO_WINDOW


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, ragged over sequences. All arrays are int32.

    The queries of sequence s are its last n = cu_seqlens_q[s + 1] - cu_seqlens_q[s] positions: those from
    seq_lens[s] - n to seq_lens[s] - 1. Chunked prefill and decode differ only in n.

    Attributes:
        token_ids: (T,)
        positions: (T,) absolute position of each token in its sequence.
        slot_mapping: (T,) where the token's key and value go: block * block_size + offset.
        cu_seqlens_q: (S + 1,) prefix sums of the queries per sequence.
        seq_lens: (S,) tokens of each sequence in the cache once this step has written its own.
        block_tables: (S, MB) block ids; entries that no query can see hold anything.
        windows, num_sinks: (S,) where some sequence of the step streams (StreamingLLM, arXiv:2309.17453), else None;
            see Backend.paged_attention. NO_WINDOW and 0 for sequences that do not.
        sink_positions: (T,) where each query stands for the sinks' keys: min(position, sinks + window - 1). None where
            `windows` is.
        staged_extent: the extent of a batch whose arrays are on a device; None where they are numpy's.
    """

    token_ids: I32Array
    positions: I32Array
    slot_mapping: I32Array
    cu_seqlens_q: I32Array
    seq_lens: I32Array
    block_tables: I32Array
    windows: I32Array | None = None
    num_sinks: I32Array | None = None
    sink_positions: I32Array | None = None
    staged_extent: BatchExtent | None = None

    @cached_property
    def extent(self) -> BatchExtent:
        if self.staged_extent is not None:
            return self.staged_extent
        sink_window = NO_WINDOW
        if self.windows is not None and self.num_sinks is not None:
            sink_window = int(self.windows[self.num_sinks > 0].min(initial=NO_WINDOW))
        return BatchExtent(
            max_query_len=int((self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1]).max(initial=0)),
            max_seq_len=int(self.seq_lens.max(initial=0)),
            sink_window=sink_window,
        )

    @property
    def decodes(self) -> bool:
        """Whether each sequence has one token in this step."""
        return self.extent.max_query_len == 1 and len(self.token_ids) == len(self.seq_lens)


class Weight(Protocol):
    """A matrix (out, in) in the backend's own packed form, quantised as its file had it."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """The paged cache to reserve. dtype: one of tinyllm.config.KV_DTYPES but "auto"."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str


class KVCache(Protocol):
    """Keys and values of all layers; `layers[i]` is what write_kv and paged_attention take.

    The layout inside a layer is the backend's own; a block is one index of the first axis of its arrays.
    """

    @property
    def spec(self) -> KVCacheSpec: ...

    @property
    def layers(self) -> Sequence[Any]: ...

    @property
    def nbytes(self) -> int: ...


class StepRunner(Protocol):
    """Runs the steps of one engine."""

    def run(self, batch: Batch, step: Callable[[], None]) -> None:
        """Runs `step`, which launches ops over a staged batch, or what it launched for an earlier one of this kind."""
        ...


class Backend(Protocol):
    """One device's implementation of the ops. Weights, caches and buffers are those that the same backend made.

    Attributes:
        on_host: whether its arrays are numpy arrays that the host may read and write as they are.
        max_sampled_vocab: the largest vocabulary that `sample` draws from; 0 where the host samples.
        step_cost: about what a step takes here.
    """

    name: str
    on_host: bool
    max_sampled_vocab: int
    step_cost: StepCost

    # ---- what the backend holds in memory; sizes are exact, and known before anything is allocated

    def load_matrix(self, tensors: Sequence[Tensor], *, near_output: bool = False) -> Weight:
        """Packs tensors (out_i, in), stacked along their rows, into one matrix (sum of out_i, in).

        near_output: of the last layer or the LM head, where what is rounded shows most in the logits: a backend that
            rounds activations does not do so there.
        """
        ...

    def matrix_nbytes(self, parts: Sequence[tuple[str, tuple[int, int]]]) -> int:
        """Bytes that load_matrix will hold for parts given as (dtype, (out_i, in))."""
        ...

    def load_vector(self, tensors: Sequence[Tensor]) -> F32Array:
        """A norm weight or bias as float32, (n,): the tensors end to end."""
        ...

    def allocate(self, shape: tuple[int, ...]) -> F32Array:
        """A buffer for activations, its contents undefined."""
        ...

    def default_kv_dtype(self, head_dim: int) -> str:
        """How keys and values are stored where nothing else was asked for."""
        ...

    def available_nbytes(self) -> int:
        """Bytes of the device's memory that may still be taken."""
        ...

    def allocate_kv_cache(self, spec: KVCacheSpec) -> KVCache:
        """Reserves the cache. Pages of memory are touched when first written. Raises ConfigError."""
        ...

    def kv_cache_nbytes(self, spec: KVCacheSpec) -> int: ...

    def workspace_nbytes(
        self, max_tokens: int, max_in_features: int, num_heads: int, num_kv_heads: int, head_dim: int, max_context: int,
        vocab_size: int = 0,
    ) -> int:  # fmt: skip
        """The most scratch memory that ops of these sizes hold; max_context: columns of block_tables in tokens.

        vocab_size: that of the logits that `sample` draws from; 0 where it does not.
        """
        ...

    # ---- between host and device

    def to_host(self, array: Any) -> NDArray[Any]:
        """An array's contents in numpy, once all that was begun is done; on_host: the array itself."""
        ...

    def to_device(self, array: NDArray[Any]) -> Any:
        """A host array's contents where ops take them; on_host: the array itself, C-contiguous."""
        ...

    def upload(self, target: Any, source: NDArray[Any]) -> None:
        """target[...] = source, for a buffer of this backend and a host array of the same shape and dtype."""
        ...

    def padded(self, batch: Batch) -> Batch:
        """A host batch with as much padding as this backend wants, so that few sizes of steps occur.

        Padding adds sequences of one token at the end: token 0 at position 0, slot -1, seq_len 0. What is computed
        of them means nothing, and is written nowhere that lasts.
        """
        ...

    def stage(self, batch: Batch) -> Batch:
        """A padded host batch as ops take it: on the device."""
        ...

    def reserve(
        self, max_tokens: int, max_in_features: int, num_heads: int, num_kv_heads: int, head_dim: int, max_context: int,
        vocab_size: int = 0,
    ) -> None:  # fmt: skip
        """Takes the scratch memory that `workspace_nbytes` tells of, where steps must not take any themselves."""
        ...

    def step_runner(self) -> StepRunner:
        """One for each model, cache and workspace that steps run over."""
        ...

    # ---- ops

    def embedding(self, token_ids: I32Array, weight: Any, *, out: F32Array | None = None) -> F32Array:
        """(T,), (V, M) -> (T, M)"""
        ...

    def linear(
        self, x: F32Array, weight: Any, bias: F32Array | None = None, *, out: F32Array | None = None
    ) -> F32Array:
        """(T, in), (out, in), (out,) -> (T, out)"""
        ...

    def rms_norm(self, x: F32Array, weight: F32Array, eps: float, *, out: F32Array | None = None) -> F32Array:
        """(..., M), (M,) -> (..., M). x may have any strides but a contiguous last axis; out may be x."""
        ...

    def add_rms_norm(
        self, residual: F32Array, x: F32Array, weight: F32Array, eps: float, *, out: F32Array | None = None
    ) -> F32Array:
        """residual (T, M) += x (T, M), in place; returns rms_norm(residual). Same bits as the two steps apart."""
        ...

    def layer_norm(
        self, x: F32Array, weight: F32Array, bias: F32Array, eps: float, *, out: F32Array | None = None
    ) -> F32Array:
        """(T, M), (M,), (M,) -> (T, M)"""
        ...

    def rope(self, q: F32Array, k: F32Array, cos: F32Array, sin: F32Array) -> None:
        """Rotates q (T, H, D) and k (T, KH, D) in place by the angles of cos, sin (T, R / 2), R <= D.

        Pairs are (i, i + R / 2). q and k may be strided views with a contiguous last axis.
        """
        ...

    def rotate(self, q: F32Array, cos: F32Array, sin: F32Array, *, out: F32Array) -> None:
        """rope's rotation of q (T, H, D), written to out (T, H, D)."""
        ...

    def add(self, x: F32Array, y: F32Array) -> None:
        """x (T, M) += y (T, M)"""
        ...

    def scale(self, x: F32Array, factor: float) -> None:
        """x (T, M) *= factor, as float32"""
        ...

    def gather_rows(self, x: F32Array, rows: I32Array) -> F32Array:
        """Rows (R,), on the host, of x (T, M) -> (R, M), valid until the next call."""
        ...

    def silu_mul(self, x: F32Array, *, out: F32Array | None = None) -> F32Array:
        """(T, 2I) -> (T, I): silu(x[:, :I]) * x[:, I:]"""
        ...

    def gelu_mul(self, x: F32Array, *, out: F32Array | None = None) -> F32Array:
        """(T, 2I) -> (T, I): gelu(x[:, :I]) * x[:, I:], the tanh form"""
        ...

    def gelu(self, x: F32Array, *, out: F32Array | None = None) -> F32Array:
        """(T, I) -> (T, I): the tanh form of GELU; out may be x"""
        ...

    def softcap(self, x: F32Array, cap: float) -> None:
        """x = cap * tanh(x / cap), in place, (T, N)"""
        ...

    def sample(self, logits: F32Array, draws: Sequence[tuple[int, int, float, int, float, float]]) -> list[int]:
        """Draws tokens from rows of logits (R, V), for backends that do; waits for them.

        Args:
            draws: (row, key of the noise, temperature, top_k, top_p, min_p) each; see tinyllm.sampling for what they
                mean, and engine.device_sampling for the negative numbers that stand for no token.
        """
        ...

    def write_kv(self, k: F32Array, v: F32Array, layer: Any, slot_mapping: I32Array) -> None:
        """(T, KH, D) x 2 into the slots (T,) of a cache layer, rounded to its dtype; a slot of -1 takes none.

        k, v may be strided views.
        """
        ...

    def read_kv(self, layer: Any, slots: I32Array) -> tuple[F32Array, F32Array]:
        """What slots (T,) hold, on the host: keys and values (T, KH, D). write_kv of them changes nothing."""
        ...

    def copy_blocks(self, cache: Any, pairs: I32Array) -> None:
        """(n, 2), on the host: copies block pairs[i, 0] onto pairs[i, 1] in every layer, in order."""
        ...

    def paged_attention(
        self,
        q: F32Array,
        layer: Any,
        batch: Batch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float = 0.0,
        sink_q: F32Array | None = None,
        out: F32Array | None = None,
        lse: F32Array | None = None,
    ) -> tuple[F32Array, F32Array]:
        """q (T, H, D) against the paged cache -> out (T, H, D), lse (T, H).

        Causal: the query at position p sees keys max(0, p - window + 1) <= j <= p. Query head h reads KV head
        h // (H // KH). Scores are scale * q.k, then softcap. lse is the natural log of the sum of exp(scores). Both go
        to `out` and `lse` where these are given.
        Partials cover SPLIT_KEYS keys at fixed absolute positions and are merged in ascending order. q and sink_q may
        be strided views.

        Streaming: where batch.windows[s] = W is less than the layer's `window`, sequence s has the window W and
        n = batch.num_sinks[s] sinks instead. A query at p < n + W sees keys 0 <= j <= p. From p = n + W on it sees
        keys p - W + 1 <= j <= p with q, and the sinks, 0 <= j < n, with sink_q (T, H, D): the same query as rotated
        at batch.sink_positions. The sinks are one partial (n <= SPLIT_KEYS), merged first. Nothing else is read: what
        the table holds for keys between the two does not matter. sink_q may be None where no query uses it.
        """
        ...

    def flash_attention(
        self,
        q: F32Array,
        k: F32Array,
        v: F32Array,
        *,
        scale: float,
        causal: bool = True,
        out: F32Array | None = None,
        lse: F32Array | None = None,
    ) -> tuple[F32Array, F32Array]:
        """Dense attention: q (N, Q, H, D), k and v (N, K, KH, D) -> out (N, Q, H, D), lse (N, H, Q).

        Scores are scale * q.k; query head h reads key head h // (H // KH). A causal query i sees the keys
        j <= i + K - Q; a row that sees nothing has out 0 and lse -inf. lse is the natural log of the sum of
        exp(scores). Memory beside the results is linear in Q and K.
        """
        ...

    def flash_attention_backward(
        self,
        dout: F32Array,
        q: F32Array,
        k: F32Array,
        v: F32Array,
        out: F32Array,
        lse: F32Array,
        *,
        scale: float,
        causal: bool = True,
        dq: F32Array | None = None,
        dk: F32Array | None = None,
        dv: F32Array | None = None,
    ) -> tuple[F32Array, F32Array, F32Array]:
        """The gradients of sum(dout * out) with respect to q, k and v, from what flash_attention returned.

        Recomputes the probabilities (arXiv:2205.14135, algorithm 4); the same bits in every run and for every number
        of threads.
        """
        ...
