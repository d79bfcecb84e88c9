"""Operations and bytes of one tile of paged attention and of the linear layers, from their kernels' constants."""

from __future__ import annotations

from typing import Any

from cuda_kernels.attention_f32_tiles import TileShape as F32TileShape
from cuda_kernels.attention_tiles import TileShape
from cuda_kernels.kernel import Kernel
from cuda_kernels.linear_forms import SLICE, TILE_ROWS
from cuda_kernels.matrix import matrix_nbytes
from cuda_kernels.roofline import TileWork

__all__ = ["attention_work", "linear_work"]


def attention_work(kernel: Kernel) -> TileWork | None:
    """S = Q K^T and O += P V over a tile of keys; the tile of K and V is what moves."""
    constants: dict[str, Any] = dict(kernel.constants)
    if "decode" in constants:
        plain = F32TileShape(constants["head_dim"], constants["decode"])
        products = 4 * plain.rows * plain.keys * plain.head_dim
        return TileWork(products, 8 * plain.keys * plain.head_dim, tensor=False)
    shape = constants.get("shape")
    if not isinstance(shape, TileShape):
        return None  # the combine
    nbytes = 2 * shape.keys * (shape.head_dim + 4 if shape.scaled else 2 * shape.head_dim)
    return TileWork(4 * shape.rows * shape.keys * shape.head_dim, nbytes)


def linear_work(kernel: Kernel) -> TileWork | None:
    """A slice of columns for a block's rows and tokens: its weights, and its activations in 16 bits."""
    constants: dict[str, Any] = dict(kernel.constants)
    if "form" not in constants or "token_tiles" not in constants:
        return None  # casts, and the float32 forms
    rows = 4 * TILE_ROWS * constants["row_tiles"] if "row_tiles" in constants else TILE_ROWS
    tokens = 8 * constants["token_tiles"]
    nbytes = matrix_nbytes(constants["form"], rows, SLICE) + 2 * tokens * SLICE
    return TileWork(2 * rows * tokens * SLICE, nbytes)
