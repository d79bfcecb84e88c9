"""What a launch looks for while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from cuda_kernels.emulator.errors import LaunchError


@dataclass(frozen=True)
class Checks:
    """Options of one launch. Out-of-bounds and misaligned accesses are always looked for.

    races: races in shared memory, and unordered use of a cp.async destination.
    global_races: races in global memory, between blocks and inside one.
    uninitialised: reads of shared, local and global bytes that nobody wrote.
    strict_exit: a barrier that some threads of the block have returned before is a problem.
    raise_on_problem: raise EmulatorError at the end of a launch that had problems.
    uninitialised_arguments: positions of host arrays whose contents count as never written (a `numpy.empty`).
    batch_threads: threads that advance together; more is faster until the registers leave the cache.
    max_basic_blocks: a launch that takes more steps than this is stopped as an endless loop.
    """

    races: bool = True
    global_races: bool = False
    uninitialised: bool = True
    strict_exit: bool = False
    raise_on_problem: bool = True
    uninitialised_arguments: tuple[int, ...] = ()
    batch_threads: int = 4096
    max_basic_blocks: int = 2_000_000

    def __post_init__(self) -> None:
        if self.batch_threads < 1 or self.max_basic_blocks < 1:
            raise LaunchError("batch_threads and max_basic_blocks must be at least 1")
        if any(position < 0 for position in self.uninitialised_arguments):
            raise LaunchError("uninitialised_arguments are positions in the argument list, from 0")
