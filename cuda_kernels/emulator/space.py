"""The bytes of a state space, with a state for each, seen in every width that an access can have."""

from __future__ import annotations

import numpy as np

from cuda_kernels.emulator.ptx import Array

UNMAPPED, MAPPED, WRITTEN = 0, 1, 2  # states of a byte: nobody's, never written, written
POISON = 0xCD  # what bytes hold that were never written

# One access is one element of this type: numpy moves it as a whole. complex128 stands for 16 bytes.
UNITS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
_DTYPES = ("u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c16")
ALL_WRITTEN = {width: np.full(width, WRITTEN, "u1").view(unit)[0] for width, unit in UNITS.items()}


class Space:
    """The bytes of one state space and their states, seen in every width. nbytes: of one thread's window."""

    def __init__(self, data: Array, state: Array, base: Array | None, nbytes: int) -> None:
        self.bytes, self.state_bytes = data, state
        self.views = {dtype: data.view(dtype) for dtype in _DTYPES}
        self.states = {width: state.view(unit) for width, unit in UNITS.items()}
        self.base = base  # [lanes] where each lane's window starts, None for one window for all
        self.nbytes = nbytes
