"""Draws of tokens from rows of logits: the choices of tinyllm.sampling, without sorting or exponentiating a whole row.

A task is one draw. Each pass over a row looks at 16 logits at once, and at single ones only where they matter:

- top_k: of the row cut into many more parts than k, the k-th largest maximum is a bound that k tokens reach. Those that
  do are told apart by histograms over narrowing ranges of their logits.
- top_p: tokens whose probability is below (1 - top_p) / V make up less than 1 - top_p, so none of them is in the
  nucleus; the others are told apart in the same way, by their weights in place of their number.
- the winner: what noise a token would need to beat the best so far says how rare its random number would have to be.
  Only numbers that are so rare are turned into noise.

Filters, weights and noise are float64, as on the host; only the sum of all weights of a large row is one of float32s.
"""

from __future__ import annotations

import math

import numpy as np

from tinyllm.backends.cpu_kernels.jit import device, kernel
from tinyllm.backends.cpu_kernels.sampling_noise import LEAST_NOISE, MOST_NOISE, gumbel, rarity
from tinyllm.backends.cpu_kernels.simd import (
    Vec,
    at_least,
    count_bits,
    first_bit,
    iota_mask,
    lane_max,
    lane_sum,
    load,
    load_f32,
    load_f64,
    load_first,
    load_i32,
    load_i64,
    maximum,
    splat,
    store,
    store_f32,
    store_f64,
    store_i64,
    store_u32,
    unordered,
    zeros,
)
from tinyllm.backends.cpu_kernels.vmath import exp

__all__ = ["DRAW_NBYTES", "draw", "scratch_nbytes"]

# | row, int64 | key, uint64 | temperature, float64; 0: greedy | top_k, int64; 0: all | top_p, min_p, float64 |
DRAW_NBYTES = 48

_NOT_A_NUMBER, _FORBIDDEN = -1, -2  # see engine.device_sampling
_CHUNK = 256  # tokens that give 16 maxima, one a lane
_BINS = 256
_EXACT = 1024  # rows up to this length have their weights summed in float64
_PARTS = 64  # the first guess at a nucleus leaves out tokens below this part of the rest's probability
_LOWEST = float(np.finfo(np.float32).min)
_ROUNDING = 1e-6  # relative: several times the error of a bound that is rounded to float32
_DEEPEST = -64.0  # of a logit's exponent: 2**31 such tokens together do not show in a float32 beside 1
_SLACK = 1e-4  # several times the error of a chance's exponent, where that is above -41


def scratch_nbytes(columns: int) -> int:
    """Bytes of one worker: histogram, weights, then logits or their keys."""
    return 8 * _BINS + (8 + 4) * (columns + _CHUNK) // 64 * 64


@device
def _lanes(row: int, i: int, columns: int) -> Vec:
    """The logits i to i + 15; those past the row's end are -inf."""
    if i + 16 <= columns:
        return load(row + 4 * i)
    return iota_mask(load_first(row + 4 * i, columns - i), 0, columns - i)


@device
def _largest(row: int, columns: int, maxima: int) -> tuple[float, bool]:
    """The largest logit, and whether one is NaN. To `maxima` go 16 of each chunk, which divide its tokens."""
    top, found = splat(-math.inf), 0
    for at in range(0, columns, _CHUNK):
        best = splat(-math.inf)
        if at + _CHUNK <= columns:
            for i in range(at, at + _CHUNK, 64):
                a, b = load(row + 4 * i), load(row + 4 * i + 64)
                c, d = load(row + 4 * i + 128), load(row + 4 * i + 192)
                found |= unordered(a, b) | unordered(c, d)
                best = maximum(maximum(maximum(a, b), maximum(c, d)), best)
        else:
            for i in range(at, columns, 16):
                a = _lanes(row, i, columns)
                found |= unordered(a, a)
                best = maximum(a, best)
        store(maxima + at // 4, best)
        top = maximum(best, top)
    return lane_max(top), found != 0


@device
def _nth(row: int, columns: int, value: float, n: int) -> int:
    """The n-th of the tokens whose logit is `value`, counted from 1; there must be so many."""
    wanted = splat(value)
    for i in range(0, columns, 16):
        logits = _lanes(row, i, columns)
        found = at_least(logits, wanted) & at_least(wanted, logits)
        count = count_bits(found)
        if n <= count:
            while n > 1:
                found &= found - 1
                n -= 1
            return i + first_bit(found)
        n -= count
    return columns


@device
def _collect(row: int, columns: int, bound: float, cut: float, cut_id: int, out: int) -> int:
    """Copies the logits that are at least `bound`, those that equal `cut` up to token cut_id; returns how many.

    bound: at least _LOWEST, so that a token at -inf is never among them.
    """
    limit, n = splat(bound), 0
    for i in range(0, columns, 16):
        found = at_least(_lanes(row, i, columns), limit)
        while found != 0:
            token = i + first_bit(found)
            found &= found - 1
            logit = load_f32(row + 4 * token)
            if logit != cut or token <= cut_id:
                store_f32(out + 4 * n, logit)
                n += 1
    return n


@device
def _order_bits(bits: int) -> int:
    """A float32's bits, as a signed number, to one that grows with the float32, and back; both zeros are 0."""
    return bits if bits >= 0 else -2147483648 - bits


@device
def _weigh(values: int, n: int, temperature: float, largest: float, weights: int) -> float:
    """weights (n,) = exp(value / temperature - largest), in float64; returns their sum."""
    total = 0.0
    for i in range(n):
        weight = math.exp(np.float64(load_f32(values + 4 * i)) / temperature - largest)
        store_f64(weights + 8 * i, weight)
        total += weight
    return total


@device
def _cut(values: int, weights: int, n: int, target: float, bins: int) -> tuple[float, int]:
    """Where the fewest of the largest values end whose weights reach `target`: (value, how many of that value).

    All, where they do not reach it.
    Histograms of the range that the end is in, until that holds a single value. Values and weights are overwritten.

    Args:
        weights: (n,) float64; 0 where each weighs 1.
    """
    low, high, above, weight = 1 << 31, -1 << 31, 0.0, 1.0
    for i in range(n):
        key = _order_bits(load_i32(values + 4 * i))
        store_u32(values + 4 * i, key)
        low, high = min(low, key), max(high, key)
    while low < high:
        shift = 0
        while (high - low) >> shift >= _BINS:
            shift += 1
        slot = (high - low) >> shift
        for i in range(slot + 1):
            store_f64(bins + 8 * i, 0.0)
        for i in range(n):
            place = bins + 8 * ((load_i32(values + 4 * i) - low) >> shift)
            if weights != 0:
                weight = load_f64(weights + 8 * i)
            store_f64(place, load_f64(place) + weight)
        while slot > 0 and above + load_f64(bins + 8 * slot) < target:
            above += load_f64(bins + 8 * slot)
            slot -= 1
        first, kept = low + (slot << shift), 0
        last = first + (1 << shift) - 1
        for i in range(n):  # without a branch on what is hard to foresee
            key = load_i32(values + 4 * i)
            store_u32(values + 4 * kept, key)
            if weights != 0:
                store_f64(weights + 8 * kept, load_f64(weights + 8 * i))
            kept += (key >= first) & (key <= last)
        n, low, high = kept, last, first
        for i in range(n):
            key = load_i32(values + 4 * i)
            low, high = min(low, key), max(high, key)
    if weights != 0:
        weight = load_f64(weights)
    above += weight
    count = 1
    while count < n and above < target:
        above += weight
        count += 1
    store_u32(values, _order_bits(low))
    return load_f32(values), count


@device
def _depths(logits: Vec, top: float, inverse: float) -> Vec:
    """(logits - top) * inverse; lower ones are _DEEPEST: exponentials that leave the normal numbers take long."""
    return maximum((logits - splat(top)) * splat(inverse), splat(np.float32(_DEEPEST)))


@device
def _mass(row: int, columns: int, top: float, inverse: float) -> float:
    """The sum of exp((logit - top) * inverse)."""
    total = 0.0
    for at in range(0, columns, _CHUNK):
        part = zeros()
        for i in range(at, min(at + _CHUNK, columns), 16):
            part = part + exp(_depths(_lanes(row, i, columns), top, inverse))
        total += lane_sum(part)
    return total


@device
def _top_k(row: int, columns: int, k: int, bins: int, values: int) -> tuple[float, int]:
    """(cut, id): top_k keeps the tokens above the cut, and of those at it the ids up to `id`. values: the maxima."""
    bound, parts = np.float32(_LOWEST), -(-columns // _CHUNK) * 16
    if k <= parts:
        bound = max(_cut(values, 0, parts, k, bins)[0], bound)
    n = _collect(row, columns, bound, np.float32(_LOWEST), columns, values)
    cut, count = _cut(values, 0, n, k, bins)
    return cut, _nth(row, columns, cut, count)


@device
def _bound(logit: float, other: float) -> float:
    """A float32 just below `logit`; other: another term of what it was computed from."""
    return np.float32(max(logit - _ROUNDING * (abs(logit) + abs(other)), _LOWEST))


@device
def _top_p(
    row: int, columns: int, top: float, temperature: float, p: float, cut: float, cut_id: int, limited: bool,
    bins: int, weights: int, values: int,
) -> tuple[float, int]:  # fmt: skip
    """The cut (see _top_k) of the nucleus, given that of top_k; limited: whether that leaves but a few tokens."""
    largest = np.float64(top) / temperature
    total, attempts = 0.0, 1
    if not limited:
        total, attempts = _mass(row, columns, top, np.float32(1.0 / temperature)), 3
    for attempt in range(attempts):
        bound = cut
        if attempt < attempts - 1:
            share = (1.0 - p) * total / (_PARTS if attempt == 0 else 2 * columns)
            bound = max(cut, _bound(top + temperature * math.log(share), top))
        n = _collect(row, columns, bound, cut, cut_id, values)
        weight = _weigh(values, n, temperature, largest, weights)
        target = p * (weight if limited else total)
        if weight >= target:
            break
    cut, count = _cut(values, weights, n, target, bins)
    return cut, _nth(row, columns, cut, count)


@device
def _winner(
    row: int, columns: int, key: int, top: float, temperature: float, cut: float, cut_id: int, min_p: float
) -> int:
    """The token whose scaled logit plus noise is the largest, of those that the filters keep."""
    largest, least = np.float64(top) / temperature, -math.inf
    if min_p > 0.0:
        least = largest + math.log(min_p)
        cut = max(cut, _bound(temperature * least, top))  # those close to it are told apart below
    inverse = np.float32(1.0 / temperature)
    lead = LEAST_NOISE  # the best sum so far, less `largest`: that of the most likely token is no lower
    best, token = -math.inf, 0
    limit = splat(max(cut, _bound(top + temperature * (lead - MOST_NOISE), top)))
    slack = splat(np.float32(_SLACK - lead))
    for i in range(0, columns, 16):
        logits = _lanes(row, i, columns)
        found = at_least(logits, limit)
        if found == 0:
            continue
        chance = exp(_depths(logits, top, inverse) + slack)
        found &= at_least(chance, rarity(key, i))
        while found != 0:
            candidate = i + first_bit(found)
            found &= found - 1
            logit = load_f32(row + 4 * candidate)
            scaled = np.float64(logit) / temperature
            if (logit == cut and candidate > cut_id) or scaled < least:
                continue
            value = scaled + gumbel(key, candidate)
            if value > best:
                best, token = value, candidate
                lead = max(lead, best - largest)
                limit = splat(max(cut, _bound(top + temperature * (lead - MOST_NOISE), top)))
                slack = splat(np.float32(_SLACK - lead))
    return token


@kernel
def draw(
    worker: int, begin: int, end: int, logits: int, stride: int, columns: int, draws: int, tokens: int, scratch: int,
    worker_nbytes: int,
) -> None:  # fmt: skip
    """tokens (N,) int64 of draws (N,) from rows of logits; DRAW_NBYTES tells what a draw is."""
    bins = scratch + worker * worker_nbytes
    weights = bins + 8 * _BINS
    values = weights + 8 * columns
    for task in range(begin, end):
        told = draws + task * DRAW_NBYTES
        row = logits + load_i64(told) * stride
        key, temperature, k = load_i64(told + 8), load_f64(told + 16), load_i64(told + 24)
        p, min_p = load_f64(told + 32), load_f64(told + 40)
        top, not_a_number = _largest(row, columns, values)
        if not_a_number:
            token = _NOT_A_NUMBER
        elif top == -math.inf:
            token = _FORBIDDEN
        elif temperature == 0.0 or top == math.inf:
            token = _nth(row, columns, top, 1)
        else:
            cut, cut_id = np.float32(_LOWEST), columns
            if 0 < k < columns:
                cut, cut_id = _top_k(row, columns, k, bins, values)
            if p < 1.0:
                limited = 0 < k < columns or columns <= _EXACT
                cut, cut_id = _top_p(
                    row, columns, top, temperature, p, cut, cut_id, limited, bins, weights, values
                )  # fmt: skip
            token = _winner(row, columns, key, top, temperature, cut, cut_id, min_p)
        store_i64(tokens + 8 * task, token)
