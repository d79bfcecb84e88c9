"""Peers side by side: started, asked in turn, dropped when they fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from peers.forms import Forms
from peers.interface import Room, UnavailableError
from peers.process import PeerFailedError, PeerProcess
from peers.registry import Entry
from weights import WeightsError

__all__ = ["Contestant", "Machine", "Named", "alternate", "start_all"]


@dataclass(frozen=True)
class Machine:
    """How workers are started here.

    Attributes:
        pythons: the interpreter of each program.
        forms: of the model.
        timeout: seconds that any one answer may take.
    """

    pythons: Mapping[str, str]
    forms: Forms
    threads: int
    timeout: float

    def worker(self, entry: Entry, *arguments: str) -> PeerProcess:
        return PeerProcess(self.pythons[entry.program], [entry.module, *arguments], timeout=self.timeout)

    def model(self, entry: Entry) -> str:
        """The path of the form that it reads, made now where it is not there. Raises what PeerProcess.ask does."""

        def prepare(source: Path, target: Path) -> None:
            with self.worker(entry) as worker:
                worker.ask("prepare", source=str(source), target=str(target))

        try:
            return str(self.forms.path(entry.form, prepare))
        except (OSError, WeightsError) as error:
            raise UnavailableError(f"its form of the model cannot be written: {error}") from None

    def start(self, entry: Entry, room: Room) -> Contestant:
        """A worker with the model loaded. Raises what PeerProcess.ask does."""
        model = self.model(entry)
        process = self.worker(entry)
        try:
            load = {"model": model, "threads": self.threads, "room": asdict(room), **entry.options}
            versions = process.ask("load", **load)
            process.ask("decode", prompts=[[0] * 8], steps=2)  # that it runs is seen now, not in the first row
            return Contestant(entry, process, versions, model)
        except BaseException:
            process.close()
            raise


@dataclass(frozen=True)
class Contestant:
    """A peer that is loaded, and stopped until it is asked."""

    entry: Entry
    process: PeerProcess
    versions: Mapping[str, str]
    model: str

    @property
    def name(self) -> str:
        return self.entry.name


class Named(Protocol):
    @property
    def name(self) -> str: ...


AnyPeer = TypeVar("AnyPeer", bound=Named)


def alternate(
    peers: Sequence[AnyPeer],
    repeats: int,
    measure: Callable[[AnyPeer, int], float],
    lose: Callable[[AnyPeer, Exception], None],
    *,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Measures each peer once, then each a second time, and so on, so that the machine's moods are shared by all.

    One that fails is told to `lose`, and has no result.

    Args:
        measure: of a peer and the repeat's number.
        warm: begin with a repeat -1 that does not count, for what only the first one pays.

    Returns:
        Each peer's figures, one a repeat.
    """
    figures: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for repeat in range(-1 if warm else 0, repeats):
        for peer in peers:
            if peer.name not in figures:
                continue
            try:
                figure = measure(peer, repeat)
            except (UnavailableError, PeerFailedError) as error:
                del figures[peer.name]
                lose(peer, error)
                continue
            if repeat >= 0:
                figures[peer.name].append(figure)
    return figures


def start_all(
    entries: Iterable[Entry], machine: Machine, room: Room, skip: Callable[[Entry, str], None], stack: ExitStack
) -> list[Contestant]:
    """Those that can be started, until the stack is left; `skip` is told of the others, and why."""
    contestants: list[Contestant] = []
    for entry in entries:
        try:
            contestant = machine.start(entry, room)
        except (UnavailableError, PeerFailedError) as error:
            skip(entry, str(error))
            continue
        stack.enter_context(contestant.process)
        contestants.append(contestant)
    return contestants
