"""Sampling: from rows of logits to token ids, one block a draw, without sorting.

    draws (N, 8): see sampling_rows     logits (R, V) float32, V <= 2 ** 18     out (N,): a token id each

    1  the largest logit and its lowest id: all of a greedy draw
    2  top_k, then top_p: each finds a cut, and tokens below it are out
    3  the token with the largest log(probability) + Gumbel noise (sampling_noise), among those at least min_p likely

A cut is (K, I): kept are the tokens whose logit's ordered bits are above K, and those equal to K with ids up to I.
It is found by radix selection: a pass over the row adds up, for each value of the next 8 bits, what the tokens with the
bits found so far weigh; the bits where the sum, from the top, reaches the target are the next ones.

    pass     0      1      2      3    |    4       5      6
    bits   31-24  23-16  15-8    7-0   |  17-10    9-2    1-0     the last three among ties, lowest id first
           of the logit's ordered bits |  of the id, inverted

Selection ends where all that is left under a prefix is kept. For top_k a token weighs 1 and the target is k. For top_p
it weighs its probability relative to the largest as an integer, in units of 2 ** -44, and the target is top_p times the
sum, both rounded down. Integers add up to the same in any order: a draw depends on its row and its words alone.

The sums are in shared memory, 16 copies of each so that a warp's lanes seldom meet: [half][value][copy], the low and
the high half of 64 bits each.

Precision: relative probabilities have an error of 2 ** -22 + 2 ** -23 * |log2 p|, so top_p may cut a token earlier or
later than exact arithmetic where a sum comes within about 2e-6 of top_p, and min_p where a ratio comes as near to
min_p. A logit of +inf wins, lowest id first. A row with a NaN gives NOT_A_NUMBER, one with nothing above -inf
FORBIDDEN, padding 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.primitives import (
    FULL_MASK,
    Pointer,
    Value,
    as_float,
    as_uint,
    device_function,
    exp2,
    load4,
    store4,
)
from cuda_kernels.sampling_noise import GOLDEN, log2_exponential, mix
from cuda_kernels.sampling_rows import FORBIDDEN, NOT_A_NUMBER, ROW_WORDS

__all__ = ["MAX_VOCABULARY", "kernels_for_report", "sample_kernel", "sample_tokens"]

MAX_VOCABULARY = 1 << 18  # the passes among ties look at 18 bits of the id

_i32, _u32, _u64, _f32 = types.int32, types.uint32, types.uint64, types.float32

_SIGN = np.uint32(0x80000000)
_KEY_MINUS_INF, _KEY_INF, _KEY_NAN = np.uint32(0x007FFFFF), np.uint32(0xFF800000), np.uint32(0xFFFFFFFF)
_ZERO, _MINUS_INF = np.float32(0), np.float32(-np.inf)
_NO_ID = np.uint32(0xFFFFFFFF)

_DIGITS = 256
_COPIES = 16
_HIGH = _DIGITS * _COPIES  # where the high halves begin
_SUMS = 2 * _HIGH
_ID_SHIFT = 14  # an id's 18 bits go to the top of a word
_ID_LAST = np.uint32(MAX_VOCABULARY - 1)
_ONE = np.float32(2.0**44)  # the weight of the most likely token
_U0, _U1, _U32 = np.uint64(0), np.uint64(1), np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


def _word_of_address(typingctx: Any, array: Any, index: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.ptrtoint(builder.gep(args[0], [args[1]]), ir.IntType(64))
        return builder.and_(builder.trunc(builder.lshr(address, ir.IntType(64)(2)), ir.IntType(32)), ir.IntType(32)(3))

    return types.int32(array, types.int64), codegen


_words_past_alignment = intrinsic(_word_of_address)
"""How many 4-byte elements array[index] lies past a 16-byte boundary: (array, int64) -> int32"""


# ---- the order of logits


@device_function
def _ordered(x: Value) -> Value:
    """float32, no NaN -> uint32 in the same order; both zeros are one."""
    bits = as_uint(x + _ZERO)
    return _u32(bits ^ _u32(_u32(_i32(bits) >> 31) | _SIGN))


@device_function
def _logit(key: Value) -> Value:
    """The inverse of _ordered."""
    return as_float(_u32(key ^ _SIGN) if key >= _SIGN else _u32(~key))


@device_function
def _load(logits: Pointer, row: Value, first: Value, vocab: Value) -> Value:
    """logits[row + first : row + first + 4], aligned to 16 bytes; -inf for those outside [0, vocab)."""
    if first >= 0 and first + 4 <= vocab:
        return load4(logits, row + first)
    a = b = c = d = _MINUS_INF
    if 0 <= first < vocab:
        a = logits[row + first]
    if 0 <= first + 1 < vocab:
        b = logits[row + first + 1]
    if 0 <= first + 2 < vocab:
        c = logits[row + first + 2]
    if 0 <= first + 3 < vocab:
        d = logits[row + first + 3]
    return a, b, c, d


@device_function
def _shuffle(value: Value, offset: Value) -> Value:
    return _u32(cuda.shfl_xor_sync(FULL_MASK, _i32(value), offset))


@device_function
def _warp_best(key: Value, index: Value) -> Value:
    """The largest key of the warp and the lowest index among its equals."""
    for k in range(5):
        other_key, other_index = _shuffle(key, 1 << k), _shuffle(index, 1 << k)
        if other_key > key or (other_key == key and other_index < index):
            key, index = other_key, other_index
    return key, index


# ---- weights


@device_function
def _weight(x: Value, top: Value, scale: Value) -> Value:
    """2 ** ((x - top) * scale), as a multiple of 2 ** -44."""
    return _u64(exp2((x - top) * scale) * _ONE)


@device_function
def _add(sums: Value, digit: Value, copy: Value, weight: Value) -> None:
    """Adds 64 bits to a digit's sum as two halves; they are exact once all threads are through."""
    slot = _u32(digit * _u32(_COPIES) + copy)
    low, high = _u32(weight & _LOW), _u32(weight >> _U32)
    before = cuda.atomic.add(sums, slot, low)
    if _u32(before + low) < low:
        high = _u32(high + _u32(1))
    if high:
        cuda.atomic.add(sums, _u32(slot + _u32(_HIGH)), high)


@device_function
def _target(top_p: Value, total: Value) -> Value:
    """top_p * 2 ** -32 * total rounded down, at least 1, for totals below 2 ** 63."""
    target = (total >> _U32) * _u64(top_p) + (((total & _LOW) * _u64(top_p)) >> _U32)
    return max(target, _U1)


def _build_sample(*, threads: int) -> Callable[..., None]:
    warps = threads // 32
    scanning_warps = _DIGITS // 32
    assert _DIGITS <= threads and warps <= 32

    @device_function
    def block_best(key: Value, index: Value, keys: Value, indices: Value) -> Value:
        """_warp_best for the block."""
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        key, index = _warp_best(key, index)
        if lane == 0:
            keys[warp] = key
            indices[warp] = index
        cuda.syncthreads()
        other = lane if lane < warps else 0
        key, index = _warp_best(keys[other], indices[other])
        cuda.syncthreads()
        return key, index

    @device_function
    def scan(sums: Value, totals: Value) -> Value:
        """(digit, its sum, the sum of the larger digits of this warp) of the first 256 threads, largest digit first."""
        thread = _u32(cuda.threadIdx.x)
        lane = thread & _u32(31)
        digit = _u32(_u32(_DIGITS - 1) - thread)
        own = _U0
        for k in range(_COPIES):
            slot = _u32(digit * _u32(_COPIES) + _u32(_u32(k + thread) & _u32(_COPIES - 1)))  # to spread over banks
            own += (_u64(sums[_u32(slot + _u32(_HIGH))]) << _U32) + _u64(sums[slot])
        reached = own
        for k in range(5):
            before = _u64(cuda.shfl_up_sync(FULL_MASK, types.int64(reached), 1 << k))
            if lane >= _u32(1 << k):
                reached += before
        if lane == _u32(31):
            totals[thread >> _u32(5)] = reached
        return digit, own, reached - own

    def sample(logits: Pointer, stride: Value, vocab: Value, draws: Pointer, out: Pointer) -> None:
        sums = cuda.shared.array(_SUMS, types.uint32, alignment=16)
        totals = cuda.shared.array(scanning_warps, types.uint64)
        found = cuda.shared.array(3, types.uint64)  # the digit, the sum above it, its own
        keys = cuda.shared.array(warps, types.uint32)
        indices = cuda.shared.array(warps, types.uint32)

        thread, draw = _i32(cuda.threadIdx.x), _i32(cuda.blockIdx.x)
        key_low, key_high, scale_bits, top_k = load4(draws, draw * ROW_WORDS)
        top_p, min_p_bits, active, row_number = load4(draws, draw * ROW_WORDS + 4)
        if active == 0:
            if thread == 0:
                out[draw] = 0
            return
        row = types.int64(row_number) * stride
        shift = _words_past_alignment(logits, row)
        start = _i32(4 * thread - shift)  # of this thread's first four

        # the largest logit
        best_key, best_id = _u32(0), _NO_ID
        for first in range(start, vocab, 4 * threads):
            four = _load(logits, row, _i32(first), vocab)
            for j in range(4):
                key = _ordered(four[j]) if four[j] == four[j] else _KEY_NAN
                if key > best_key:
                    best_key, best_id = key, _u32(first + j)
        top_key, top_id = block_best(best_key, best_id, keys, indices)
        scale = as_float(scale_bits)
        if scale == _ZERO or top_key >= _KEY_INF or top_key <= _KEY_MINUS_INF:
            if thread == 0:
                token = _i32(top_id)
                if top_key > _KEY_INF:
                    token = _i32(NOT_A_NUMBER)
                elif top_key <= _KEY_MINUS_INF:
                    token = _i32(FORBIDDEN)
                out[draw] = token
            return
        top = _logit(top_key)

        # top_k and top_p
        cut_key, cut_id = _KEY_MINUS_INF, _i32(-4)  # lower than the ids of what lies before the row
        copy = _u32(thread & (_COPIES - 1))
        for stage in range(2):
            by_count = stage == 0
            if (top_k == 0 or top_k >= _u32(vocab)) if by_count else top_p == 0:
                continue
            target = _u64(top_k)
            key_prefix, key_mask, id_prefix, id_mask = _u32(0), _u32(0), _u32(0), _u32(0)
            step = 0
            while step < 7:
                in_key = step < 4
                digit_shift = _u32(24 - 8 * (step if in_key else step - 4))
                for k in range(4 * thread, _SUMS, 4 * threads):
                    store4(sums, k, _u32(0), _u32(0), _u32(0), _u32(0))
                cuda.syncthreads()
                for first in range(start, vocab, 4 * threads):
                    four = _load(logits, row, _i32(first), vocab)
                    for j in range(4):
                        key, token = _ordered(four[j]), _i32(first + j)
                        word = _u32(~_u32(token) << _u32(_ID_SHIFT))
                        if (
                            (key > cut_key or (key == cut_key and token <= cut_id))
                            and _u32(key & key_mask) == key_prefix
                            and _u32(word & id_mask) == id_prefix
                        ):
                            digit = _u32(_u32((key if in_key else word) >> digit_shift) & _u32(_DIGITS - 1))
                            _add(sums, digit, copy, _U1 if by_count else _weight(four[j], top, scale))
                cuda.syncthreads()

                digit, own, above = _u32(0), _U0, _U0
                if thread < _DIGITS:
                    digit, own, above = scan(sums, totals)
                cuda.syncthreads()
                total = _U0
                for k in range(scanning_warps):
                    total += totals[k]
                    if k < thread >> 5:
                        above += totals[k]
                if step == 0:
                    target = min(target, total) if by_count else _target(top_p, total)
                if above < target <= above + own:  # one thread's
                    found[0], found[1], found[2] = _u64(digit), above, own
                cuda.syncthreads()
                digit, own = _u32(found[0]), found[2]
                target -= found[1]

                if in_key:
                    key_prefix = _u32(key_prefix | _u32(digit << digit_shift))
                    key_mask = _u32(_u32(0xFFFFFFFF) << digit_shift)
                else:
                    id_prefix = _u32(id_prefix | _u32(digit << digit_shift))
                    id_mask = _u32(_u32(0xFFFFFFFF) << digit_shift)
                least = _U1
                if not by_count:
                    least = _weight(_logit(key_prefix), top, scale) if step >= 3 else _U0
                step += 1
                if target + least > own:  # it takes the last of them too
                    step = 7
            # the prefix begins what is kept, unless the cut so far lies inside it
            if id_mask:
                cut_key, cut_id = key_prefix, _i32(_ID_LAST - _u32(id_prefix >> _u32(_ID_SHIFT)))
            elif key_prefix > cut_key:
                cut_key, cut_id = key_prefix, _i32(_ID_LAST)

        # the draw
        min_p = as_float(min_p_bits)
        noise_key = (_u64(key_high) << _U32) | _u64(key_low)
        best_key, best_id = _u32(0), _NO_ID
        for first in range(start, vocab, 4 * threads):
            four = _load(logits, row, _i32(first), vocab)
            for j in range(4):
                key, token = _ordered(four[j]), _i32(first + j)
                ratio = (four[j] - top) * scale
                if (key > cut_key or (key == cut_key and token <= cut_id)) and ratio >= min_p:
                    noise = log2_exponential(mix(noise_key + _u64(_u32(token + 1)) * GOLDEN))
                    score = _ordered(ratio - noise)
                    if score > best_key:
                        best_key, best_id = score, _u32(token)
        best_key, best_id = block_best(best_key, best_id, keys, indices)
        if thread == 0:
            out[draw] = _i32(best_id)

    return sample


@functools.cache
def sample_kernel(threads: int = 1024) -> Kernel:
    """One block a draw."""
    signature = ("f32*", "i64", "i32", "u32*", "i32*")
    return Kernel("sample_tokens", _build_sample, (("threads", threads),), signature, threads)


def kernels_for_report() -> list[Kernel]:
    return [sample_kernel()]


def sample_tokens(rt: Runtime, logits: Array, draws: Array, out: Array) -> None:
    """Gives each draw its token.

    Args:
        logits: (R, V) float32, V at most MAX_VOCABULARY; rows may lie any distance apart, and begin anywhere.
        draws: (N, ROW_WORDS) uint32, made by sampling_rows.pack_rows; their rows are below R.
        out: (N,) int32: a token id, NOT_A_NUMBER or FORBIDDEN; 0 for padding.

    Raises:
        KernelArgumentError: a shape, dtype or stride is none of these.
    """
    require(logits.ndim == 2 and 1 <= logits.shape[1] <= MAX_VOCABULARY, f"sampling: no logits of shape {logits.shape}")
    rows, vocab = logits.shape
    require(vocab == 1 or logits.strides[1] == 4, "sampling: the logits of a row must be contiguous")
    require(rows == 1 or logits.strides[0] % 4 == 0, "sampling: rows of logits must be whole float32 apart")
    require(draws.ndim == 2 and draws.shape[1] == ROW_WORDS, f"sampling: draws must be (N, {ROW_WORDS})")
    require(out.shape == draws.shape[:1], f"sampling: {draws.shape[0]} draws, but out has shape {out.shape}")
    require(bool(draws.flags.c_contiguous and out.flags.c_contiguous), "sampling: draws and out must be contiguous")
    if draws.shape[0]:
        arguments = (logits, logits.strides[0] // 4, vocab, draws, out)
        rt.launch(sample_kernel(), (draws.shape[0], 1, 1), arguments)
