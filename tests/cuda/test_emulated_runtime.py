"""The emulated device's memory: freed with its arrays, and graphs that hold no copies from or to the host."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_kernels.compile import Compiler
from cuda_kernels.elementwise import add
from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.errors import KernelArgumentError


@pytest.fixture
def device(compiler: Compiler) -> EmulatedRuntime:
    return EmulatedRuntime(compiler, memory_nbytes=1 << 20)


def test_memory_is_freed_with_the_last_view(device: EmulatedRuntime) -> None:
    array = device.empty((4, 6), np.float32)
    view = array[1:, 2:]
    row = view[0].view(np.int32)
    del array, view
    assert device.memory.allocated_nbytes == 96
    assert device.memory.contains(row)
    del row
    assert device.memory.allocated_nbytes == 0
    assert device.free_nbytes() == 1 << 20


def test_a_graph_launches_again_what_was_recorded_and_nothing_ran_before(device: EmulatedRuntime) -> None:
    x, y = device.from_host(np.ones((2, 8), np.float32)), device.from_host(np.full((2, 8), 2, np.float32))
    graph = device.capture(lambda: add(device, x, y))
    assert (device.download(x) == 1).all()
    graph.launch()
    graph.launch()
    assert (device.download(x) == 5).all()
    assert sum(totals.launches for totals in device.totals.values()) == 2


@pytest.mark.parametrize("kind", ["upload", "download"])
def test_copies_to_or_from_the_host_cannot_be_recorded(device: EmulatedRuntime, kind: str) -> None:
    x = device.from_host(np.ones(8, np.float32))

    def copies() -> None:
        if kind == "upload":
            device.upload(x, np.zeros(8, np.float32))
        else:
            device.download(x)

    with pytest.raises(AssertionError, match="inside a recorded step"):
        device.capture(copies)
    device.upload(x, np.zeros(8, np.float32))
    assert (device.download(x) == 0).all()


def test_what_a_kernel_cannot_take_is_named(device: EmulatedRuntime) -> None:
    x = device.from_host(np.ones((2, 8), np.float32))
    with pytest.raises(KernelArgumentError):
        add(device, x, device.from_host(np.ones((2, 7), np.float32)))
