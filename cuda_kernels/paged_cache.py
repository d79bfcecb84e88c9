"""One layer of the paged key-value cache: its layout, its stored dtypes, its size.

A block holds `block_size` consecutive positions of one sequence. Inside a block every KV head has a tile of its own:

    k[block, head]   block_size x head_dim, row-major, contiguous       k_scale[block, head]   block_size float32
        slot 0   | d0 d1 ... |                                              slot 0  | s |
        slot 1   | d0 d1 ... |                                              slot 1  | s |
        ...                                                                 ...

so that a thread block working for one head reads whole lines of 16-byte pieces, and slot number
block * block_size + offset is row ((block * KH + head) * block_size + offset) of the flattened rows.

Stored dtypes, and the arrays that hold them:

    f32    float32
    f16    uint16, IEEE binary16 bits
    bf16   uint16, the upper half of a float32's bits
    int8   int8 in -127..127, value = stored * scale
    fp8    uint8, e4m3 bits (OCP 8-bit Floating Point Specification, 1.0: 4 exponent bits of bias 7, no infinity,
           largest 448), value = stored * scale

int8 and fp8 have one float32 scale per token and head, never one per block: what is stored for a token depends on
that token alone. See `kv_formats` for how they are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cuda_kernels.launch import Array, Runtime, require

__all__ = [
    "CACHE_DTYPES",
    "MAX_BLOCK_SIZE",
    "SCALED_DTYPES",
    "PagedLayer",
    "allocate_layer",
    "allocate_layers",
    "layer_nbytes",
]

CACHE_DTYPES: dict[str, type[np.generic]] = {
    "f32": np.float32,
    "f16": np.uint16,
    "bf16": np.uint16,
    "int8": np.int8,
    "fp8": np.uint8,
}
"""Cache dtype -> the numpy dtype of its arrays."""

SCALED_DTYPES = ("int8", "fp8")
MAX_BLOCK_SIZE = 256


@dataclass(frozen=True)
class PagedLayer:
    """One layer's keys and values.

    Attributes:
        dtype: "f32", "f16", "bf16", "int8" or "fp8".
        k, v: (NB, KH, BS, D), C-contiguous, see the module for their dtypes.
        k_scale, v_scale: (NB, KH, BS) float32 for int8 and fp8, else None.

    Raises:
        KernelArgumentError: unknown dtype, or arrays that do not fit together; BS must be a power of two from 1 to
            256, D a multiple of 4, a tile of BS x D elements a multiple of 16 bytes.
    """

    dtype: str
    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None

    def __post_init__(self) -> None:
        _check_layout(self.dtype, self.k.shape)
        for array in (self.k, self.v):
            require(array.shape == self.k.shape, f"keys {self.k.shape} and values {self.v.shape} differ in shape")
            require(array.dtype == CACHE_DTYPES[self.dtype], f"a {self.dtype} cache cannot hold {array.dtype}")
            require(bool(array.flags.c_contiguous), "cache arrays must be C-contiguous")
        for scale in (self.k_scale, self.v_scale):
            require((scale is not None) == (self.dtype in SCALED_DTYPES), f"scales do not fit a {self.dtype} cache")
            if scale is not None:
                fits = scale.shape == self.k.shape[:3] and scale.dtype == np.float32
                require(fits and bool(scale.flags.c_contiguous), "scales must be (NB, KH, BS) float32, contiguous")

    @property
    def num_blocks(self) -> int:
        return int(self.k.shape[0])

    @property
    def num_kv_heads(self) -> int:
        return int(self.k.shape[1])

    @property
    def block_size(self) -> int:
        return int(self.k.shape[2])

    @property
    def head_dim(self) -> int:
        return int(self.k.shape[3])

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All arrays of the layer; a block is one index of the first axis of each."""
        return tuple(array for array in (self.k, self.v, self.k_scale, self.v_scale) if array is not None)

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays)


def _check_layout(dtype: str, shape: tuple[int, ...]) -> None:
    require(dtype in CACHE_DTYPES, f"no cache dtype {dtype!r}: one of {', '.join(CACHE_DTYPES)}")
    require(len(shape) == 4 and min(shape) >= 1, f"a cache array is (NB, KH, BS, D), not {shape}")
    _, _, block_size, head_dim = shape
    power_of_two = block_size & (block_size - 1) == 0
    require(power_of_two and block_size <= MAX_BLOCK_SIZE, f"block size {block_size}: must be a power of two up to 256")
    require(head_dim % 4 == 0, f"head size {head_dim}: must be a multiple of 4")
    tile_nbytes = block_size * head_dim * np.dtype(CACHE_DTYPES[dtype]).itemsize
    require(tile_nbytes % 16 == 0, f"a {block_size} x {head_dim} tile of {dtype} is no multiple of 16 bytes")


def layer_nbytes(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: str) -> int:
    """The exact size of one layer's arrays. Raises KernelArgumentError."""
    _check_layout(dtype, (num_blocks, num_kv_heads, block_size, head_dim))
    rows = num_blocks * num_kv_heads * block_size
    per_row = head_dim * np.dtype(CACHE_DTYPES[dtype]).itemsize + (4 if dtype in SCALED_DTYPES else 0)
    return 2 * rows * per_row


def allocate_layers(
    rt: Runtime, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: str
) -> tuple[PagedLayer, ...]:
    """Layers of zeros, side by side in one array (and one of scales), so that one launch can copy blocks in all.

    Raises KernelArgumentError.
    """
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    _check_layout(dtype, shape)
    require(num_layers >= 1, f"{num_layers} layers")
    values = rt.empty((num_layers, 2, *shape), CACHE_DTYPES[dtype])
    rt.fill(values, 0)
    if dtype not in SCALED_DTYPES:
        return tuple(PagedLayer(dtype, k, v) for k, v in values)
    scales = rt.empty((num_layers, 2, *shape[:3]), np.float32)
    rt.fill(scales, 0)
    return tuple(PagedLayer(dtype, *values[layer], *scales[layer]) for layer in range(num_layers))


def allocate_layer(
    rt: Runtime, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: str
) -> PagedLayer:
    """One layer of zeros. Raises KernelArgumentError."""
    return allocate_layers(rt, 1, num_blocks, block_size, num_kv_heads, head_dim, dtype)[0]
