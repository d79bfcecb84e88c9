"""DeviceMemory: allocations stay apart, keep their red zones, and know what has been written."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cuda_kernels.emulator import Checks, DeviceMemory, DeviceMemoryError, EmulatorError, Program
from tests.emulator.ptx_text import plain_kernel

COPY = plain_kernel(
    ".param .u64 src, .param .u64 dst",
    """ld.param.u64 %rd1, [src]; ld.param.u64 %rd2, [dst]; mov.u32 %tid, %tid.x;
    mad.wide.u32 %rd1, %tid, 4, %rd1; mad.wide.u32 %rd2, %tid, 4, %rd2;
    ld.global.u32 %r1, [%rd1]; st.global.u32 [%rd2], %r1;""",
)


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=40))
def test_allocations_never_overlap_and_keep_red_zones(steps: list[tuple[bool, int]]) -> None:
    memory = DeviceMemory(1 << 15)
    live: list[np.ndarray] = []
    for allocate, number in steps:
        if allocate:
            try:
                array = memory.empty(number, np.uint8)
            except DeviceMemoryError:
                continue
            assert not memory.written(array) or number == 0
            array[...] = len(live) + 1
            live.append(array)
        elif live:
            memory.free(live.pop(number % len(live)))
        spans = sorted((address(array), address(array) + array.nbytes) for array in live)
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert start - end >= 1024
        assert memory.allocated_nbytes == sum(array.nbytes for array in live)
        assert int((memory.state != 0).sum()) == memory.allocated_nbytes
    for array in live:
        assert len(np.unique(array)) <= 1
        memory.free(array)
    assert memory.allocated_nbytes == 0
    assert memory.empty(memory.nbytes - 256, np.uint8).nbytes == memory.nbytes - 256


@pytest.mark.parametrize("shape", [0, 1, (3, 5), (2, 0, 3), 257])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
def test_allocations_are_aligned_contiguous_and_poisoned(shape: int | tuple[int, ...], dtype: type) -> None:
    array = DeviceMemory(1 << 14).empty(shape, dtype)
    assert array.flags.c_contiguous
    assert array.dtype == dtype
    assert address(array) % 256 == 0
    assert (array.reshape(-1).view(np.uint8) == 0xCD).all()


def test_a_full_memory_says_so() -> None:
    memory = DeviceMemory(4096)
    memory.empty(4096, np.uint8)
    with pytest.raises(DeviceMemoryError, match="out of device memory: 1 bytes asked for, 4096 of 4096"):
        memory.empty(1, np.uint8)


def test_only_allocations_are_freed_and_only_once() -> None:
    memory = DeviceMemory(1 << 14)
    array = memory.empty(64, np.float32)
    with pytest.raises(DeviceMemoryError, match="not an allocation"):
        memory.free(array[1:])
    with pytest.raises(DeviceMemoryError, match="not an allocation"):
        memory.free(np.zeros(4))
    memory.free(array)
    with pytest.raises(DeviceMemoryError, match="not an allocation"):
        memory.free(array)


def test_written_bytes_are_those_marked_and_those_that_kernels_wrote() -> None:
    memory = DeviceMemory(1 << 14)
    source, target = memory.empty((8, 8), np.uint32), memory.empty(64, np.uint32)
    memory.mark_written(source[:, :5])
    assert memory.written(source[:, 1:5])
    assert not memory.written(source[:, 5])
    memory.mark_written(source)

    Program(COPY).launch(1, 40, [source, target], memory=memory)

    assert memory.written(target[:40])
    assert not memory.written(target[40:41])
    assert not memory.written(target)


def test_arrays_and_slices_are_passed_by_address_without_copies() -> None:
    memory = DeviceMemory(1 << 14)
    source, target = memory.empty(96, np.uint32), memory.empty(96, np.uint32)
    source[...] = np.arange(96)
    memory.mark_written(source)

    Program(COPY).launch(1, 32, [source[7:], target[60:]], memory=memory)

    assert target[60:92].tolist() == list(range(7, 39))
    assert memory.contains(source[95:]) and memory.contains(target)
    assert not memory.contains(np.zeros(3))


def test_host_arrays_join_arrays_of_the_memory() -> None:
    memory = DeviceMemory(1 << 14)
    target = memory.empty(32, np.uint32)

    Program(COPY).launch(1, 32, [np.arange(32, dtype=np.uint32), target], memory=memory)

    assert target.tolist() == list(range(32))
    assert memory.allocated_nbytes == target.nbytes


def test_freed_memory_is_reported() -> None:
    memory = DeviceMemory(1 << 14)
    source, target = memory.empty(32, np.uint32), memory.empty(32, np.uint32)
    memory.mark_written(source)
    memory.free(source)
    with pytest.raises(EmulatorError, match="out-of-bounds: read of 4 bytes"):
        Program(COPY).launch(1, 32, [source, target], memory=memory)


def test_memory_that_was_never_written_is_reported() -> None:
    memory = DeviceMemory(1 << 14)
    source, target = memory.empty(32, np.uint32), memory.empty(32, np.uint32)
    with pytest.raises(EmulatorError, match="uninitialised-read"):
        Program(COPY).launch(1, 32, [source, target], memory=memory)


def test_read_only_host_arrays_are_not_written_back() -> None:
    source, target = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    target.flags.writeable = False
    Program(COPY).launch(1, 32, [source, target])
    assert (target == 0).all()


def test_a_large_memory_costs_what_is_touched() -> None:
    memory = DeviceMemory(1 << 36)
    source, target = memory.empty(32, np.uint32), memory.empty(32, np.uint32)
    memory.mark_written(source)
    Program(COPY).launch(1, 32, [source, target], memory=memory, checks=Checks(global_races=True))
    assert memory.written(target)


def test_an_access_whose_last_bytes_alone_lie_outside_is_reported() -> None:
    body = """ld.param.u64 %rd1, [x]; mov.u32 %tid, %tid.x; mad.wide.u32 %rd1, %tid, 16, %rd1;
        ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];"""
    program = Program(plain_kernel(".param .u64 x", body))
    program.launch(1, 2, [np.zeros(8, np.uint32)])
    with pytest.raises(EmulatorError, match=r"out-of-bounds: read of 16 bytes .* at byte 16 of an array of 28 bytes"):
        program.launch(1, 2, [np.zeros(7, np.uint32)])
