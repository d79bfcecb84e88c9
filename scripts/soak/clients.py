"""Clients: most are honest, and many are not."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from soak.bodies import Ask, large, malformed
from soak.tally import Tally
from soak.wire import Answer, connection, post, read_answer

__all__ = ["Clients"]

PATIENCE = 180.0  # seconds; who waits longer for an answer calls it lost
THINK_SECONDS = 0.5  # on average, from an answer to the next request
_VICTIM = """
import socket, sys
host, port, data = sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3])
socks = [socket.create_connection((host, port)) for _ in range(4)]
for sock in socks:
    sock.sendall(data)
while socks[0].recv(1 << 12):
    print("+", flush=True)
"""


@dataclass
class Clients:
    """All clients of one server.

    Args:
        asks: what the honest ones ask.
        burst: how many requests a burst sends at once.
        idle_seconds: how long the silent, and those who never read, stay at most.
    """

    host: str
    port: int
    rng: random.Random
    asks: list[Ask]
    tally: Tally
    burst: int
    idle_seconds: float

    async def run(self, count: int, until: Callable[[], bool]) -> None:
        """Runs `count` clients, a few processes to be killed, and bursts, until it is time to end."""
        clients = [self._client(until) for _ in range(count)]
        rare = [self._repeat(until, self.idle_seconds, self.killed), self._repeat(until, 30.0, self.burst_at_once)]
        await asyncio.gather(*clients, *rare)

    async def _client(self, until: Callable[[], bool]) -> None:
        acts: list[tuple[Callable[[], Awaitable[object]], float]] = [
            *((self.honest, 60), (self.conversation, 8), (self.abort, 15)),
            *((self.malformed, 8), (self.slow, 4), (self.never_reads, 2), (self.silent, 3)),
        ]
        weights = [weight for _, weight in acts]
        while not until():
            ((act, _),) = self.rng.choices(acts, weights)
            await self._safely(act)
            await asyncio.sleep(self.rng.expovariate(1 / THINK_SECONDS))

    async def _repeat(self, until: Callable[[], bool], pause: float, act: Callable[[], Awaitable[object]]) -> None:
        while not until():
            await self._safely(act)
            for _ in range(int(pause * 10)):
                if until():
                    break
                await asyncio.sleep(0.1)

    async def _safely(self, act: Callable[[], Awaitable[object]]) -> None:
        name = getattr(act, "__name__", "?")
        try:
            await asyncio.wait_for(act(), PATIENCE)
        except asyncio.TimeoutError:
            self.tally.faults.append(f"{name}: no end after {PATIENCE:g} s")
        except (OSError, EOFError, ValueError) as error:  # EOFError: the answer was cut off
            self.tally.faults.append(f"{name}: {error!r}")

    # ---- honest

    async def ask(self, ask: Ask) -> Answer:
        """One request on a connection of its own."""
        async with connection(self.host, self.port) as (reader, writer):
            writer.write(ask.to_bytes())
            return await read_answer(reader)

    async def honest(self) -> None:
        ask = self.rng.choice(self.asks)
        answer = await self.ask(ask)
        self.tally.note(ask, answer)
        if answer.status == 429:
            await asyncio.sleep(self.rng.uniform(0.5, 1.5) * min(5, int(answer.headers["retry-after"])))

    async def conversation(self) -> None:
        """Several requests on one connection, and at last some at once."""
        async with connection(self.host, self.port) as (reader, writer):
            asks = self.rng.choices(self.asks, k=self.rng.randint(2, 4))
            for ask in asks[:-2]:
                writer.write(ask.to_bytes())
                self.tally.note(ask, await read_answer(reader))
            writer.write(b"".join(ask.to_bytes() for ask in asks[-2:]))
            for ask in asks[-2:]:
                self.tally.note(ask, await read_answer(reader))

    async def burst_at_once(self) -> None:
        """More at once than the queue holds."""
        asks = self.rng.choices([ask for ask in self.asks if ask.path == "/v1/completions"], k=self.burst)
        for ask, answer in zip(asks, await asyncio.gather(*map(self.ask, asks)), strict=True):
            self.tally.note(ask, answer)

    async def slow(self) -> None:
        """Reads a byte at a time for a while; the answer is whole nevertheless."""
        ask = self.rng.choice([ask for ask in self.asks if ask.streams])
        async with connection(self.host, self.port, receive_buffer=2048) as (reader, writer):
            writer.write(post(ask.path, ask.body, close=True))
            whole = asyncio.StreamReader(limit=1 << 22)
            for _ in range(self.rng.randint(10, 400)):
                whole.feed_data(await reader.read(1))
                await asyncio.sleep(self.rng.uniform(0, 0.01))
            while piece := await reader.read(256):
                whole.feed_data(piece)
                await asyncio.sleep(0.001)
            whole.feed_eof()
            self.tally.note(ask, await read_answer(whole))

    # ---- unlucky, and worse

    async def abort(self) -> None:
        """Leaves at a random moment: before it has asked all, before the answer, within it."""
        ask = self.rng.choice([*self.asks, large(self.rng)])
        data = ask.to_bytes()
        async with connection(self.host, self.port) as (reader, writer):
            sent = self.rng.choice([0, self.rng.randrange(len(data)), *[len(data)] * 4])
            writer.write(data[:sent])
            await asyncio.sleep(self.rng.choice([0, self.rng.expovariate(10), self.rng.expovariate(1)]))
            if self.rng.random() < 0.5 and sent == len(data):
                await asyncio.wait({asyncio.ensure_future(reader.read(100))}, timeout=0.5)
        self.tally.left["aborted"] += 1

    async def malformed(self) -> None:
        async with connection(self.host, self.port) as (reader, writer):
            writer.write(malformed(self.rng))
            try:
                answer = await read_answer(reader)
            except (EOFError, ConnectionError):  # closed with bytes unread
                self.tally.left["closed on what is not HTTP"] += 1
                return
        self.tally.note_refusal(answer, "malformed")

    async def never_reads(self) -> None:
        async with connection(self.host, self.port, receive_buffer=1024) as (_, writer):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(large(self.rng).to_bytes())
            await asyncio.sleep(self.rng.uniform(0, self.idle_seconds))
        self.tally.left["never read"] += 1

    async def silent(self) -> None:
        """Connects, and says nothing or half a head."""
        async with connection(self.host, self.port) as (_, writer):
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a"[: self.rng.randrange(40)])
            await asyncio.sleep(self.rng.uniform(0, self.idle_seconds))
        self.tally.left["silent"] += 1

    async def killed(self) -> None:
        """A process of its own that is killed with its connections open."""
        data = post("/v1/completions", large(self.rng).body)
        command = [sys.executable, "-S", "-c", _VICTIM, self.host, str(self.port), data.hex()]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        await process.stdout.read(self.rng.randrange(1, 20))
        process.send_signal(signal.SIGKILL)
        await process.wait()
        self.tally.left["killed"] += 4
