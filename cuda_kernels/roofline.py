"""The roofline: the least time that a kernel's arithmetic and memory traffic allow, and how full it can keep a GPU.

Sources: Williams, Waterman and Patterson, "Roofline" (2009); occupancy from the CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability", and the allocation granularities of the CUDA Occupancy Calculator.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Architecture", "Ceilings", "Occupancy", "TileWork", "occupancy"]

REGISTER_GRANULARITY = 256  # registers are handed out per warp in multiples of this
SHARED_GRANULARITY = 128
RESERVED_SHARED = 1024  # of each block, by the system, since sm_80


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor, and of the part that stands for the architecture.

    Attributes:
        max_warps, max_blocks: resident at once.
        registers: 32-bit, of the multiprocessor.
        shared_nbytes: of the multiprocessor; a block may have 1 KB less.
        device: a part of the architecture, by name; its figures are those of the vendor's data sheet.
        bandwidth: of its memory, bytes per second.
        tensor_flops, f32_flops: peaks per second: dense f16 tensor-core products with float32 sums, float32 FMA.
    """

    name: str
    max_warps: int
    max_blocks: int
    registers: int
    shared_nbytes: int
    device: str
    bandwidth: float
    tensor_flops: float
    f32_flops: float

    @property
    def ceilings(self) -> Ceilings:
        return Ceilings(self.bandwidth, self.tensor_flops, self.f32_flops)


@dataclass(frozen=True)
class TileWork:
    """What one block does for one tile.

    Attributes:
        flop: operations, a fused multiply-add counted as two.
        nbytes: moved between global memory and the multiprocessor.
        tensor: whether the operations are the tensor cores'.
    """

    flop: float
    nbytes: float
    tensor: bool = True

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flop / self.nbytes


@dataclass(frozen=True)
class Ceilings:
    """What a GPU can do in a second: bytes of its memory, tensor-core operations, float32 operations."""

    bandwidth: float
    tensor_flops: float
    f32_flops: float

    def floor_seconds(self, work: TileWork) -> float:
        """No kernel does the work in less time."""
        return max(work.nbytes / self.bandwidth, work.flop / self.peak(work))

    def attainable_flops(self, work: TileWork) -> float:
        """The most operations per second at the work's intensity."""
        return min(self.peak(work), work.intensity * self.bandwidth)

    def peak(self, work: TileWork) -> float:
        return self.tensor_flops if work.tensor else self.f32_flops


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("sm_80", 64, 32, 65536, 164 << 10, "A100 SXM 80 GB", 2.04e12, 312e12, 19.5e12),
        Architecture("sm_86", 48, 16, 65536, 100 << 10, "RTX 3090", 0.936e12, 71e12, 35.6e12),
        Architecture("sm_89", 48, 24, 65536, 100 << 10, "RTX 4090", 1.008e12, 165e12, 82.6e12),
        Architecture("sm_90a", 64, 32, 65536, 228 << 10, "H100 SXM", 3.35e12, 989e12, 67e12),
        Architecture("sm_100a", 64, 32, 65536, 228 << 10, "B200", 8.0e12, 2250e12, 75e12),
        Architecture("sm_120", 48, 24, 65536, 100 << 10, "RTX 5090", 1.792e12, 210e12, 105e12),
    )
}


@dataclass(frozen=True)
class Occupancy:
    """How many blocks of a kernel a multiprocessor holds, and which resource stops one more."""

    blocks: int
    warps: int
    max_warps: int
    limit: str

    @property
    def fraction(self) -> float:
        return self.warps / self.max_warps


def occupancy(architecture: Architecture, *, threads: int, registers: int, shared_nbytes: int) -> Occupancy:
    """How many blocks fit on a multiprocessor.

    Args:
        registers: of a thread.
        shared_nbytes: of a block, static and dynamic.

    0 blocks where one alone asks for more than there is.
    """
    warps = -(-threads // 32)
    warp_registers = _round_up(registers * 32, REGISTER_GRANULARITY)
    shared = _round_up(shared_nbytes + RESERVED_SHARED, SHARED_GRANULARITY)
    # A multiprocessor's four parts have a quarter of the registers each: warps are counted per part.
    warps_of_registers = architecture.registers // 4 // warp_registers * 4 if warp_registers else architecture.max_warps
    limits = {
        "registers": warps_of_registers // warps,
        "shared memory": architecture.shared_nbytes // shared,
        "warps": architecture.max_warps // warps,
        "blocks": architecture.max_blocks,
    }
    limit = min(limits, key=lambda name: limits[name])
    blocks = limits[limit]
    return Occupancy(blocks, blocks * warps, architecture.max_warps, limit)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
