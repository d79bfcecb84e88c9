"""What the two forms of linear kernels share: tiles of rows, and how a tile's results leave them."""

from __future__ import annotations

from tinyllm.backends.cpu_kernels.jit import device
from tinyllm.backends.cpu_kernels.simd import (
    VF,
    Builder,
    Value,
    const,
    load,
    load_first,
    pointer,
    store,
    store_first,
    zeros,
)

__all__ = ["MAX_TILE", "STAGING_NBYTES", "finish_rows", "row_offsets", "store_results"]

MAX_TILE = 16  # rows
STAGING_NBYTES = 64 * MAX_TILE  # a tile's results, sixteen outputs a row


def row_offsets(b: Builder, tile: int, stride: Value, rows: Value) -> list[Value]:
    """Byte offsets of the tile's rows; those past the last repeat it, and their results go unused."""
    last = b.sub(rows, const(1))
    return [b.mul(b.select(b.icmp_signed("<", const(t), last), const(t), last), stride) for t in range(tile)]


def store_results(b: Builder, accs: list[Value], result: Value) -> None:
    """result[t] = accs[t]"""
    for t, acc in enumerate(accs):
        b.store(acc, pointer(b, result, VF, 64 * t), align=4)


@device
def finish_rows(result: int, rows: int, group: int, out_features: int, bias: int, out: int, out_stride: int) -> None:
    """Row t of `out` gets the group's outputs, result[t] + bias; those past out_features are left out."""
    first = 16 * group
    lanes = out_features - first
    at = out + 4 * first
    if lanes >= 16 and bias == 0:
        for t in range(rows):
            store(at + t * out_stride, load(result + 64 * t))
        return
    added = load_first(bias + 4 * first, lanes) if bias != 0 else zeros()
    for t in range(rows):
        values = load(result + 64 * t)
        store_first(at + t * out_stride, values + added if bias != 0 else values, lanes)
