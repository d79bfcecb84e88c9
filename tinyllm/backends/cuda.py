"""The ops on a GPU: kernels of `cuda_kernels` over CuPy arrays, or the same kernels' PTX over numpy arrays.

Each op hands arrays to a launcher of `cuda_kernels`, which checks them; nothing waits for the GPU but `to_host`, and
nothing is allocated in a step. Decode steps are recorded as CUDA graphs the second time that one of their size runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels import activations, elementwise, gather, kv_cache_kernels, norms, rope
from cuda_kernels.attention_inputs import AttentionInputs
from cuda_kernels.embedding import embedding
from cuda_kernels.errors import KernelArgumentError
from cuda_kernels.launch import Array, Runtime
from cuda_kernels.linear import linear, linear_scratch_nbytes
from cuda_kernels.paged_attention import (
    HEAD_DIM_MULTIPLES,
    check_head_dim,
    paged_attention,
    paged_attention_scratch_nbytes,
)
from cuda_kernels.paged_cache import PagedLayer, allocate_layers, layer_nbytes
from cuda_kernels.sampling import MAX_VOCABULARY, sample_tokens
from cuda_kernels.sampling_rows import ROW_WORDS, SamplingRow, pack_rows
from tinyllm.backends.base import NO_WINDOW, Batch, F32Array, I32Array, KVCacheSpec, StepRunner
from tinyllm.backends.cuda_blas import Cublas, DenseWeight, dense_nbytes
from tinyllm.backends.cuda_flash_attention import CudaFlashAttention
from tinyllm.backends.cuda_graphs import GraphSteps
from tinyllm.backends.cuda_staging import Staging, pad_batch
from tinyllm.backends.cuda_weights import CudaWeight, load_weight, weight_nbytes
from tinyllm.backends.host import EagerSteps
from tinyllm.errors import ConfigError
from tinyllm.step_cost import StepCost
from weights import Tensor

__all__ = ["CudaBackend"]


MAX_PARTIALS = 256 << 20  # bytes for attention's partial results; steps that need more do with none


@dataclass(frozen=True)
class CudaKVCache:
    spec: KVCacheSpec
    layers: tuple[PagedLayer, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class CudaBackend(CudaFlashAttention):
    """The ops of `Backend` on one GPU.

    Args:
        runtime: the GPU, real or emulated.
        name: "cuda" or "cuda-emulated".
        compute_dtype, cuda_graphs, fast_matmul: see tinyllm.config.EngineConfig.

    Raises:
        ConfigError: fast_matmul without a real GPU.
    """

    on_host = False
    max_sampled_vocab = MAX_VOCABULARY
    step_cost = StepCost(fixed=185, per_read=1 / 1000, per_key=1 / 10_000)  # of a llama of 1.24 G in bf16 on an H100

    def __init__(
        self,
        runtime: Runtime,
        *,
        name: str = "cuda",
        compute_dtype: str = "auto",
        cuda_graphs: bool = True,
        fast_matmul: bool = False,
    ) -> None:
        self.name = name
        self.runtime = runtime
        self.compute_dtype = compute_dtype
        self._staging = Staging(runtime)
        self._scratch: Array = runtime.empty(0, np.uint8)
        self._pairs: Array = runtime.empty((64, 2), np.int32)
        self._draws: Array = runtime.empty((256, ROW_WORDS), np.uint32)
        self._drawn: Array = runtime.empty(256, np.int32)
        self._rows: dict[tuple[int, int], tuple[Array, Array]] = {}
        self._block_size, self._max_tokens = 0, 0
        self._use_graphs = cuda_graphs and not fast_matmul  # CuPy refuses cuBLAS while a graph is recorded
        if fast_matmul and runtime.name != "gpu":
            raise ConfigError(f"fast_matmul is cuBLAS, which needs a GPU; the device is {name}")
        self._cublas = Cublas(runtime) if fast_matmul else None
        self._scratch_generation = 0

    # ---- memory

    def matrix_nbytes(self, parts: Sequence[tuple[str, tuple[int, int]]]) -> int:
        if self._cublas is not None:
            return dense_nbytes(parts, self.compute_dtype)
        return weight_nbytes(parts, self.compute_dtype)

    def load_matrix(self, tensors: Sequence[Tensor], *, near_output: bool = False) -> CudaWeight | DenseWeight:
        if self._cublas is not None:
            return self._cublas.load(tensors, self.compute_dtype)
        return load_weight(self.runtime, tensors, self.compute_dtype)

    def load_vector(self, tensors: Sequence[Tensor]) -> F32Array:
        return self.to_device(np.concatenate([tensor.dequantize() for tensor in tensors]))

    def allocate(self, shape: tuple[int, ...]) -> F32Array:
        return self.runtime.empty(shape, np.float32)

    def default_kv_dtype(self, head_dim: int) -> str:
        wanted = "f16" if self.compute_dtype == "auto" else self.compute_dtype
        return wanted if head_dim % HEAD_DIM_MULTIPLES[wanted] == 0 else "f32"

    def available_nbytes(self) -> int:
        return self.runtime.free_nbytes()

    def kv_cache_nbytes(self, spec: KVCacheSpec) -> int:
        return spec.num_layers * self._per_layer(
            layer_nbytes, spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim, spec.dtype
        )

    def allocate_kv_cache(self, spec: KVCacheSpec) -> CudaKVCache:
        self._block_size = spec.block_size
        self._per_layer(check_head_dim, spec.dtype, spec.head_dim)
        layers = self._per_layer(
            allocate_layers,
            *(self.runtime, spec.num_layers, spec.num_blocks, spec.block_size),
            *(spec.num_kv_heads, spec.head_dim, spec.dtype),
        )
        return CudaKVCache(spec, layers)

    @staticmethod
    def _per_layer(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except KernelArgumentError as error:
            raise ConfigError(f"no such KV cache on a GPU: {error}") from error

    def workspace_nbytes(
        self, max_tokens: int, max_in_features: int, num_heads: int, num_kv_heads: int, head_dim: int, max_context: int,
        vocab_size: int = 0,
    ) -> int:  # fmt: skip
        return max(
            linear_scratch_nbytes(max_tokens, max_in_features),
            min(paged_attention_scratch_nbytes(max_tokens, num_heads, head_dim, max_context), MAX_PARTIALS),
        )

    def reserve(
        self, max_tokens: int, max_in_features: int, num_heads: int, num_kv_heads: int, head_dim: int, max_context: int,
        vocab_size: int = 0,
    ) -> None:  # fmt: skip
        self._max_tokens = max_tokens
        self._scratch_of(
            self.workspace_nbytes(max_tokens, max_in_features, num_heads, num_kv_heads, head_dim, max_context)
        )

    def _scratch_of(self, nbytes: int) -> Array:
        """Scratch memory of at least nbytes; the one buffer serves one op after the other."""
        if self._scratch.nbytes < nbytes:
            self._scratch = self.runtime.empty(nbytes, np.uint8)
            self._scratch_generation += 1
        return self._scratch

    # ---- between host and device

    def to_host(self, array: Array) -> NDArray[Any]:
        return self.runtime.download(array)

    def to_device(self, array: NDArray[Any]) -> Array:
        return self.runtime.from_host(np.ascontiguousarray(array))

    def upload(self, target: Array, source: NDArray[Any]) -> None:
        self.runtime.upload(target, source)

    def padded(self, batch: Batch) -> Batch:
        return pad_batch(batch, self._block_size, self._max_tokens) if self._use_graphs else batch

    def stage(self, batch: Batch) -> Batch:
        return self._staging.stage(batch)

    def step_runner(self) -> StepRunner:
        return GraphSteps(self.runtime, self._generation) if self._use_graphs else EagerSteps()

    def _generation(self) -> tuple[int, int]:
        """Changes where memory has moved that recorded launches point at."""
        return self._staging.generation, self._scratch_generation

    # ---- ops

    def embedding(
        self, token_ids: I32Array, weight: CudaWeight | DenseWeight, *, out: F32Array | None = None
    ) -> F32Array:
        if isinstance(weight, DenseWeight):
            assert self._cublas is not None
            return self._cublas.embedding(token_ids, weight, self._out(out, (token_ids.shape[0], weight.shape[1])))
        assert len(weight.parts) == 1, "an embedding of one storage format"
        out = self._out(out, (token_ids.shape[0], weight.shape[1]))
        if token_ids.shape[0]:
            embedding(self.runtime, token_ids, weight.parts[0][1], out)
        return out

    def linear(
        self,
        x: F32Array,
        weight: CudaWeight | DenseWeight,
        bias: F32Array | None = None,
        *,
        out: F32Array | None = None,
    ) -> F32Array:
        T, columns = x.shape
        out = self._out(out, (T, weight.shape[0]))
        if T == 0:
            return out
        if isinstance(weight, DenseWeight):
            assert self._cublas is not None
            self._cublas.linear(x, weight, bias, out)
            return out
        scratch = self._scratch_of(linear_scratch_nbytes(T, columns))
        for first, matrix in weight.parts:
            end = first + matrix.rows
            part_bias = None if bias is None else bias[first:end]
            linear(self.runtime, x, matrix, part_bias, out[:, first:end], scratch)
        return out

    def rms_norm(self, x: F32Array, weight: F32Array, eps: float, *, out: F32Array | None = None) -> F32Array:
        out = self._out(out, x.shape)
        if x.shape[0]:
            norms.rms_norm(self.runtime, x, weight, eps, out)
        return out

    def add_rms_norm(
        self, residual: F32Array, x: F32Array, weight: F32Array, eps: float, *, out: F32Array | None = None
    ) -> F32Array:
        out = self._out(out, x.shape)
        if x.shape[0]:
            norms.add_rms_norm(self.runtime, residual, x, weight, eps, out)
        return out

    def layer_norm(
        self, x: F32Array, weight: F32Array, bias: F32Array, eps: float, *, out: F32Array | None = None
    ) -> F32Array:
        out = self._out(out, x.shape)
        if x.shape[0]:
            norms.layer_norm(self.runtime, x, weight, bias, eps, out)
        return out

    def rope(self, q: F32Array, k: F32Array, cos: F32Array, sin: F32Array) -> None:
        if q.shape[0]:
            rope.rope(self.runtime, q, k, cos, sin)

    def rotate(self, q: F32Array, cos: F32Array, sin: F32Array, *, out: F32Array) -> None:
        if q.shape[0]:
            rope.rotate_into(self.runtime, q, cos, sin, out)

    def add(self, x: F32Array, y: F32Array) -> None:
        if x.shape[0]:
            elementwise.add(self.runtime, x, y)

    def scale(self, x: F32Array, factor: float) -> None:
        if x.shape[0]:
            elementwise.scale(self.runtime, x, factor)

    def gather_rows(self, x: F32Array, rows: I32Array) -> F32Array:
        R, M = len(rows), x.shape[1]
        if (R, M) not in self._rows:
            self._rows[R, M] = self.runtime.empty(R, np.int32), self.runtime.empty((R, M), np.float32)
        indices, out = self._rows[R, M]
        if R:
            self.runtime.upload(indices, np.ascontiguousarray(rows, np.int32))
            gather.gather_rows(self.runtime, x, indices, out)
        return out

    def silu_mul(self, x: F32Array, *, out: F32Array | None = None) -> F32Array:
        out = self._out(out, (x.shape[0], x.shape[1] // 2))
        if x.shape[0]:
            activations.silu_mul(self.runtime, x, out)
        return out

    def gelu_mul(self, x: F32Array, *, out: F32Array | None = None) -> F32Array:
        out = self._out(out, (x.shape[0], x.shape[1] // 2))
        if x.shape[0]:
            activations.gelu_mul(self.runtime, x, out)
        return out

    def gelu(self, x: F32Array, *, out: F32Array | None = None) -> F32Array:
        out = self._out(out, x.shape)
        if x.shape[0]:
            activations.gelu(self.runtime, x, out)
        return out

    def softcap(self, x: F32Array, cap: float) -> None:
        if x.shape[0]:
            activations.softcap(self.runtime, x, cap)

    def sample(self, logits: F32Array, draws: Sequence[tuple[int, int, float, int, float, float]]) -> list[int]:
        if self._draws.shape[0] < len(draws):
            self._draws = self.runtime.empty((2 * len(draws), ROW_WORDS), np.uint32)
            self._drawn = self.runtime.empty(2 * len(draws), np.int32)
        words, out = self._draws[: len(draws)], self._drawn[: len(draws)]
        self.runtime.upload(words, pack_rows([SamplingRow(*draw) for draw in draws]))
        sample_tokens(self.runtime, logits, words, out)
        tokens: list[int] = self.to_host(out).tolist()
        return tokens

    def write_kv(self, k: F32Array, v: F32Array, layer: PagedLayer, slot_mapping: I32Array) -> None:
        if k.shape[0]:
            kv_cache_kernels.write_kv(self.runtime, k, v, layer, slot_mapping)

    def read_kv(self, layer: PagedLayer, slots: I32Array) -> tuple[F32Array, F32Array]:
        shape = (len(slots), layer.num_kv_heads, layer.head_dim)
        if len(slots) == 0:
            return np.empty(shape, np.float32), np.empty(shape, np.float32)
        k, v = self.allocate(shape), self.allocate(shape)
        kv_cache_kernels.read_kv(self.runtime, layer, self.to_device(slots), k, v)
        return self.to_host(k), self.to_host(v)

    def copy_blocks(self, cache: CudaKVCache, pairs: I32Array) -> None:
        if len(pairs):
            if len(self._pairs) < len(pairs):
                self._pairs = self.runtime.empty((2 * len(pairs), 2), np.int32)
            device_pairs = self._pairs[: len(pairs)]
            self.runtime.upload(device_pairs, pairs)
            kv_cache_kernels.copy_blocks(self.runtime, cache.layers, pairs, device_pairs)

    def paged_attention(
        self,
        q: F32Array,
        layer: PagedLayer,
        batch: Batch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float = 0.0,
        sink_q: F32Array | None = None,
        out: F32Array | None = None,
        lse: F32Array | None = None,
    ) -> tuple[F32Array, F32Array]:
        T, H, D = q.shape
        extent = batch.extent
        out = self._out(out, (T, H, D))
        lse = self._out(lse, (T, H))
        if T == 0:
            return out, lse
        partials = paged_attention_scratch_nbytes(
            *(T, H, D, extent.max_seq_len), num_seqs=batch.seq_lens.shape[0], num_kv_heads=layer.num_kv_heads
        )
        scratch = self._scratch_of(min(partials, MAX_PARTIALS))
        paged_attention(
            self.runtime,
            AttentionInputs(
                q=q,
                layer=layer,
                cu_seqlens_q=batch.cu_seqlens_q,
                seq_lens=batch.seq_lens,
                block_tables=batch.block_tables,
                windows=batch.windows,
                num_sinks=batch.num_sinks,
                sink_q=sink_q,
                scale=scale,
                window=NO_WINDOW if window is None else window,
                softcap=softcap,
                out=out,
                lse=lse,
                max_query_len=extent.max_query_len,
                max_seq_len=extent.max_seq_len,
                scratch=scratch,
            ),
        )
        return out, lse

    # ---- results that nobody gave a place

    def _out(self, out: F32Array | None, shape: tuple[int, ...]) -> F32Array:
        if out is None:
            return self.allocate(shape)
        assert out.shape == shape, f"out has shape {out.shape} where {shape} is due"
        return out
