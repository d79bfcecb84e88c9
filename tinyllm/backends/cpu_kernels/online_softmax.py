"""The online softmax of one row over a tile of keys (arXiv:1805.02867), for paged and for dense attention.

m is no more than SLACK below the largest score so far: moving it means to rescale all that was summed up, and what is
left out of it cancels in the end. Most tiles leave it where it is, and none of their lanes need be compared then.
"""

from __future__ import annotations

import math

import numpy as np

from tinyllm.backends.cpu_kernels.jit import device
from tinyllm.backends.cpu_kernels.simd import (
    at_least,
    iota_mask,
    lane_max,
    load,
    load_f32,
    maximum,
    splat,
    store,
    store_f32,
    zeros,
)
from tinyllm.backends.cpu_kernels.vmath import exp_flushed, exp_scalar, tanh

__all__ = ["SLACK", "TILE_KEYS", "exponentiate", "find_maximum", "move_maximum", "softmax_row", "start_row"]

SLACK = 6.0  # probabilities grow to exp(6) at most
TILE_KEYS = 64  # keys whose scores are exponentiated together


@device
def start_row(state: int) -> None:
    """state, 128 bytes: m, and 64 bytes further sixteen lanes whose sum is l."""
    store_f32(state, -math.inf)
    store(state + 64, zeros())


@device
def move_maximum(new_m: float, state: int, acc: int, columns: int) -> None:
    """m becomes new_m; l and acc are rescaled, if anything was summed up yet."""
    old_m = load_f32(state)
    if old_m != -math.inf:
        keep = splat(exp_scalar(old_m - new_m))
        store(state + 64, load(state + 64) * keep)
        for d in range(0, columns, 16):
            store(acc + 4 * d, load(acc + 4 * d) * keep)
    store_f32(state, new_m)


@device
def softmax_row(
    scores: int, tile: int, first: int, end: int, scale: float, cap: float, state: int, acc: int, columns: int
) -> None:
    """Turns the scores of keys first <= j < end of the tile at key `tile` into exp(score - m), the others into 0.

    Scores are scaled first, then capped where cap > 0. Where m moves, l and acc (columns,) are rescaled.
    """
    find_maximum(scores, tile, first, end, scale, cap, state, acc, columns)
    exponentiate(scores, state)


@device
def find_maximum(
    scores: int, tile: int, first: int, end: int, scale: float, cap: float, state: int, acc: int, columns: int
) -> None:
    """The first half of softmax_row: the scores scaled, capped and masked, and m moved if need be."""
    old_m = load_f32(state)
    top = splat(old_m)
    for at in range(0, TILE_KEYS, 16):
        key = tile + at
        values = splat(-math.inf)
        if key + 16 > first and key < end:
            values = load(scores + 4 * at) * splat(scale)
            if cap > 0.0:
                values = splat(cap) * tanh(values / splat(cap))
            if key < first or key + 16 > end:
                values = iota_mask(values, first - key, end - key)
            top = maximum(values, top)
        store(scores + 4 * at, values)
    if at_least(top, splat(old_m + np.float32(SLACK))) != 0:
        move_maximum(lane_max(top), state, acc, columns)


@device
def exponentiate(scores: int, state: int) -> None:
    """The second half: exp(score - m) of a whole tile, added to l. Rows apart from each other, it never branches."""
    m = splat(load_f32(state))
    total = load(state + 64)
    for at in range(0, TILE_KEYS, 16):
        probs = exp_flushed(load(scores + 4 * at) - m)
        store(scores + 4 * at, probs)
        total = total + probs
    store(state + 64, total)
