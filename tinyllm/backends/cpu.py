"""The ops on a CPU: numba kernels over numpy arrays, weights kept quantised.

Each op checks shapes by assertion, then hands addresses and strides to a kernel of `cpu_kernels`; small ops run on the
calling thread, larger ones on all workers, with the same bits. A backend runs one op at a time, from any thread.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import SPLIT_KEYS, Batch, F32Array, I32Array, KVCacheSpec
from tinyllm.backends.cpu_flash_attention import CpuFlashAttention
from tinyllm.backends.cpu_kernels import attention, rows
from tinyllm.backends.cpu_kernels.amx import has_amx
from tinyllm.backends.cpu_kernels.attention_amx import suits_amx
from tinyllm.backends.cpu_kernels.jit import Kernel, address_of
from tinyllm.backends.cpu_kernels.kv_cache import (
    TOKENS,
    KVLayer,
    PagedKVCache,
    allocate,
    cache_nbytes,
    read,
    write_kernel,
)
from tinyllm.backends.cpu_kernels.memory import aligned_zeros
from tinyllm.backends.cpu_kernels.packing import PackedWeight, packed_nbytes
from tinyllm.backends.cpu_kernels.threads import JOB, ThreadPool
from tinyllm.backends.cpu_linear import CpuLinear
from tinyllm.backends.cpu_program import Program, ProgramSteps, StagedBatches
from tinyllm.backends.cpu_sampling import CpuSampling
from tinyllm.backends.host import HostBackend

__all__ = ["CpuBackend", "PackedWeight"]

# Work below which a second thread costs more than it brings, in the units that each op passes to _run.
_PARALLEL_WORK = 32768

# Decode runs one split per task while there are fewer queries times KV heads than this per worker.
_PARTIAL_TASKS = 4


def _available_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _print_compiling(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class CpuBackend(CpuLinear, CpuFlashAttention, CpuSampling, HostBackend):
    """The ops of `Backend` on the threads of this process.

    Args:
        num_threads: worker threads; None means as many as the CPUs that this process may use.
        activations: "f32" or "int8"; see tinyllm.config.EngineConfig.
        on_compile: called with one line, at most once, before a kernel is compiled; prints to stderr by default.
    """

    name = "cpu"

    def __init__(
        self,
        num_threads: int | None = None,
        on_compile: Callable[[str], None] | None = None,
        activations: str = "f32",
    ) -> None:
        self.num_threads = num_threads or _available_cpus()
        self.activations = activations
        self.matrix_unit = has_amx()
        self._report = on_compile or _print_compiling
        self._reported = False
        self._job = np.zeros(JOB + 64, np.int64)  # the kernel that runs, and its arguments
        self._job_address = int(self._job.ctypes.data)
        self._job_memory = self._job.data.cast("B")
        self._scratch = aligned_zeros(0)
        self._scratch_address = int(self._scratch.ctypes.data)
        self._scratch_generation = 0
        self._program: Program | None = None  # that ops are recorded into
        self._staged = StagedBatches()

    @cached_property
    def _address_of(self) -> Callable[[NDArray[Any]], int]:
        return address_of.build(self._on_compile)

    @cached_property
    def _threads(self) -> ThreadPool:
        return ThreadPool(self.num_threads, self._on_compile)

    def _on_compile(self) -> None:
        if not self._reported:
            self._reported = True
            self._report("compiling the CPU kernels, once; they are kept in the cache folder")

    def _run(self, kernel: Kernel, tasks: int, work: int, *arguments: int | float) -> None:
        """Runs a kernel over its tasks; `work` is about the number of elements that it touches."""
        if kernel.address == 0:
            kernel.build(self._on_compile)
        chunk = 0
        if work >= _PARALLEL_WORK and self.num_threads > 1 and tasks > 1:
            chunk = max(1, tasks // (8 * self.num_threads))
        if self._program is not None:
            self._program.add(kernel, tasks, chunk, arguments)
            return
        self._job[:JOB] = kernel.address, self._job_address + 8 * JOB, tasks, chunk
        kernel.pack_into(self._job_memory, 8 * JOB, *arguments)
        self._threads.run(self._job_address, 1, parallel=chunk > 0)

    def _record(self, step: Callable[[], None]) -> Program:
        """What a step's ops would do."""
        while True:
            generation = self._scratch_generation
            self._program = program = Program()
            try:
                step()
            finally:
                self._program = None
            if self._scratch_generation == generation:
                return program

    def step_runner(self) -> ProgramSteps:
        return ProgramSteps(self._record, lambda program: program.run(self._threads), lambda: self._scratch_generation)

    def stage(self, batch: Batch) -> Batch:
        return self._staged.stage(batch)

    def _reserve(self, nbytes: int) -> int:
        """The address of scratch memory of at least nbytes."""
        if self._scratch.nbytes < nbytes:
            self._scratch = aligned_zeros(0)  # the old memory goes before the new is reserved
            self._scratch = aligned_zeros(nbytes)
            self._scratch_address = int(self._scratch.ctypes.data)
            self._scratch_generation += 1
        return self._scratch_address

    # ---- memory

    def matrix_nbytes(self, parts: Sequence[tuple[str, tuple[int, int]]]) -> int:
        return packed_nbytes(parts)

    def default_kv_dtype(self, head_dim: int) -> str:
        if self.activations == "f32":
            return "f32"
        return "bf16" if suits_amx(head_dim) else "f16"

    def kv_cache_nbytes(self, spec: KVCacheSpec) -> int:
        return cache_nbytes(spec)

    def allocate_kv_cache(self, spec: KVCacheSpec) -> PagedKVCache:
        return allocate(spec)

    def workspace_nbytes(
        self, max_tokens: int, max_in_features: int, num_heads: int, num_kv_heads: int, head_dim: int, max_context: int,
        vocab_size: int = 0,
    ) -> int:  # fmt: skip
        heads = num_heads // num_kv_heads
        workers = self.num_threads * attention.scratch_nbytes(heads, head_dim)
        partials = _PARTIAL_TASKS * self.num_threads * (1 + -(-max_context // SPLIT_KEYS))
        linear, _ = self._linear_scratch(max_tokens, max_in_features)
        sampling = self._sampling_scratch(vocab_size) if vocab_size else 0
        return max(linear, workers + partials * attention.partial_nbytes(heads, head_dim), sampling)

    # ---- ops

    def rms_norm(self, x: F32Array, weight: F32Array, eps: float, *, out: F32Array | None = None) -> F32Array:
        address = self._address_of
        out = np.empty(x.shape, np.float32) if out is None else out
        M = x.shape[-1]
        assert x.ndim in (2, 3) and out.shape == x.shape and weight.shape == (M,)
        if x.shape[0] == 0:  # numpy gives empty arrays strides of 0
            return out
        assert x.strides[-1] == 4 and out.strides[-1] == 4
        inner, x_inner, out_inner = (1, 0, 0) if x.ndim == 2 else (x.shape[1], x.strides[1], out.strides[1])
        tasks = x.shape[0] * inner
        self._run(
            rows.rms_norm, tasks, tasks * M, address(x), x.strides[0], inner, x_inner, address(weight), eps, M,
            address(out), out.strides[0], out_inner,
        )  # fmt: skip
        return out

    def add_rms_norm(
        self, residual: F32Array, x: F32Array, weight: F32Array, eps: float, *, out: F32Array | None = None
    ) -> F32Array:
        address = self._address_of
        out = np.empty(x.shape, np.float32) if out is None else out
        T, M = x.shape
        assert residual.shape == x.shape == out.shape and weight.shape == (M,)
        assert residual.strides[1] == 4 and x.strides[1] == 4 and out.strides[1] == 4
        self._run(
            rows.add_rms_norm, T, 2 * T * M, address(residual), residual.strides[0], address(x), x.strides[0],
            address(weight), eps, M, address(out), out.strides[0],
        )  # fmt: skip
        return out

    def layer_norm(
        self, x: F32Array, weight: F32Array, bias: F32Array, eps: float, *, out: F32Array | None = None
    ) -> F32Array:
        address = self._address_of
        out = np.empty(x.shape, np.float32) if out is None else out
        T, M = x.shape
        assert out.shape == x.shape and weight.shape == bias.shape == (M,)
        assert x.strides[1] == 4 and out.strides[1] == 4
        self._run(
            rows.layer_norm, T, 2 * T * M, address(x), x.strides[0], address(weight), address(bias), eps, M,
            address(out), out.strides[0],
        )  # fmt: skip
        return out

    def rope(self, q: F32Array, k: F32Array, cos: F32Array, sin: F32Array) -> None:
        address = self._address_of
        T, half = cos.shape
        assert q.shape[0] == k.shape[0] == T and sin.shape == cos.shape and 2 * half <= q.shape[2] == k.shape[2]
        assert q.strides[2] == 4 and k.strides[2] == 4 and cos.flags.c_contiguous and sin.flags.c_contiguous
        heads = q.shape[1] + k.shape[1]
        self._run(
            rows.rope, T, 2 * T * heads * half, address(q), q.strides[0], q.strides[1], q.shape[1],
            address(k), k.strides[0], k.strides[1], k.shape[1], address(cos), address(sin), half,
        )  # fmt: skip

    def add(self, x: F32Array, y: F32Array) -> None:
        T, M = x.shape
        assert y.shape == x.shape and (T == 0 or x.strides[1] == y.strides[1] == 4)
        address = self._address_of
        self._run(rows.add, T, T * M, address(x), x.strides[0], address(y), y.strides[0], M)

    def scale(self, x: F32Array, factor: float) -> None:
        T, M = x.shape
        assert T == 0 or x.strides[1] == 4
        self._run(rows.scale, T, T * M, self._address_of(x), x.strides[0], M, factor)

    def _gated(self, kernel: Kernel, x: F32Array, columns: int, out: F32Array | None) -> F32Array:
        address = self._address_of
        T = x.shape[0]
        out = np.empty((T, columns), np.float32) if out is None else out
        assert out.shape == (T, columns) and x.strides[1] == 4 and out.strides[1] == 4
        work = 8 * T * columns
        self._run(kernel, T, work, address(x), x.strides[0], columns, address(out), out.strides[0])
        return out

    def silu_mul(self, x: F32Array, *, out: F32Array | None = None) -> F32Array:
        return self._gated(rows.silu_mul, x, x.shape[1] // 2, out)

    def gelu_mul(self, x: F32Array, *, out: F32Array | None = None) -> F32Array:
        return self._gated(rows.gelu_mul, x, x.shape[1] // 2, out)

    def gelu(self, x: F32Array, *, out: F32Array | None = None) -> F32Array:
        return self._gated(rows.gelu_rows, x, x.shape[1], out)

    def softcap(self, x: F32Array, cap: float) -> None:
        address = self._address_of
        T, N = x.shape
        assert T == 0 or (x.strides[1] == 4 and cap > 0)
        self._run(rows.softcap, T, 8 * T * N, address(x), x.strides[0], N, cap)

    def write_kv(self, k: F32Array, v: F32Array, layer: KVLayer, slot_mapping: I32Array) -> None:
        address = self._address_of
        T, KH, D = k.shape
        assert v.shape == k.shape and D == layer.head_dim and KH == layer.k.shape[1]
        assert k.strides[2] == 4 and v.strides[2] == 4 and slot_mapping.shape == (T,)
        assert slot_mapping.strides[0] == 4
        self._run(
            write_kernel(layer.storage), -(-T // TOKENS), 4 * T * KH * D, T, address(k), k.strides[0], k.strides[1],
            address(v), v.strides[0], v.strides[1], KH, D, -(-D // 16) * 16, layer.k_address, layer.v_address,
            layer.block_size, address(slot_mapping),
        )  # fmt: skip

    def read_kv(self, layer: KVLayer, slots: I32Array) -> tuple[F32Array, F32Array]:
        return read(layer, slots)

    def copy_blocks(self, cache: PagedKVCache, pairs: I32Array) -> None:
        for src, dst in pairs:
            for layer in cache.layers:
                layer.k[dst] = layer.k[src]
                layer.v[dst] = layer.v[src]

    def _streams(
        self, q: F32Array, sink_q: F32Array | None, batch: Batch, window: int
    ) -> tuple[NDArray[np.int64], int]:
        """The kernel's `streams`, and the most keys that a query sees."""
        windows, num_sinks = batch.windows, batch.num_sinks
        assert windows is not None and num_sinks is not None
        assert windows.shape == num_sinks.shape == batch.seq_lens.shape
        assert windows.flags.c_contiguous and num_sinks.flags.c_contiguous
        sinks = np.where(windows < window, num_sinks, 0)
        query = (0, 0, 0)
        if sinks.any():
            assert sinks.min() >= 0 and sinks.max() <= SPLIT_KEYS
            assert sink_q is not None and sink_q.shape == q.shape and sink_q.strides[2] == 4
            query = (self._address_of(sink_q), sink_q.strides[0], sink_q.strides[1])
        streams = np.array([self._address_of(windows), self._address_of(num_sinks), *query], np.int64)
        return streams, int((np.minimum(windows.astype(np.int64), window) + sinks).max(initial=0))

    def paged_attention(
        self,
        q: F32Array,
        layer: KVLayer,
        batch: Batch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float = 0.0,
        sink_q: F32Array | None = None,
        out: F32Array | None = None,
        lse: F32Array | None = None,
    ) -> tuple[F32Array, F32Array]:
        address = self._address_of
        T, H, D = q.shape
        S, max_blocks = batch.block_tables.shape
        KH = layer.k.shape[1]
        out = np.empty((T, H, D), np.float32) if out is None else out
        lse = np.empty((T, H), np.float32) if lse is None else lse
        assert D == layer.head_dim and H % KH == 0 and q.strides[2] == 4
        assert out.shape == q.shape and out.strides[2] == 4 and out.strides[1] == 4 * D
        assert lse.shape == (T, H) and lse.flags.c_contiguous
        assert batch.seq_lens.shape == (S,) and batch.cu_seqlens_q.shape == (S + 1,)
        assert batch.block_tables.strides[1] == 4
        heads = H // KH
        max_context = max_blocks * layer.block_size
        kernels = attention.attention_kernels(layer.storage)
        worker_nbytes = attention.scratch_nbytes(heads, D)
        all_workers = self.num_threads * worker_nbytes
        window = attention.NO_WINDOW if window is None else window
        table_stride = batch.block_tables.strides[0]
        tables, seq_lens, out_address, lse_address = (
            address(batch.block_tables), address(batch.seq_lens), address(out), address(lse)
        )  # fmt: skip
        streams, streams_address, visible = None, 0, min(window, max_context)
        if batch.windows is not None:
            streams, visible = self._streams(q, sink_q, batch, window)
            streams_address, visible = int(streams.ctypes.data), min(visible, max_context)
        work = T * H * D * visible // 4
        splits = min(-(-max_context // SPLIT_KEYS), (visible + SPLIT_KEYS - 2) // SPLIT_KEYS + 1)
        few = splits > 1 and S * KH < _PARTIAL_TASKS * self.num_threads and self.num_threads > 1
        tile_tokens = attention.query_tile(heads)
        if few and batch.decodes:
            parts = 1 + splits
            tasks = S * KH * parts
            scratch = self._reserve(all_workers + tasks * attention.partial_nbytes(heads, D))
            results = scratch + all_workers
        else:
            tasks, parts, results = ((T - S) // tile_tokens + S) * KH, 1, 0
            scratch = self._reserve(all_workers)
        self._run(
            kernels.attention, tasks, work, address(q), q.strides[0], q.strides[1], heads, KH, D, layer.k_address,
            layer.v_address, layer.block_size, address(batch.cu_seqlens_q), seq_lens, S, tables, table_stride,
            streams_address, tile_tokens, parts, results, scale, window, softcap, out_address, out.strides[0],
            lse_address, scratch, worker_nbytes,
        )  # fmt: skip
        if results:
            self._run(
                kernels.combine, S * KH, 0, heads, KH, D, seq_lens, streams_address, parts, window, results,
                out_address, out.strides[0], lse_address, scratch, worker_nbytes,
            )  # fmt: skip
        return out, lse
