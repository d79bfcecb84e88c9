"""Many clients on a server, honest and hostile, for minutes: nothing may leak, die, or be left unanswered.

    python scripts/serve_soak.py --clients 200 --seconds 600

Starts `python -m tinyllm serve` as a child process. The clients chat, complete, stream, search with beams, embed and
tokenise; some leave at a random moment, send what is no HTTP or no JSON, read a byte at a time or never, are killed, or
come in bursts beyond the queue. Every other request must be answered whole, or refused in the one error shape, and
answers must have the bits that the same request had alone, before the others came. At the end the server must be idle,
with no block held, no more memory than after the first minute or two, and end with status 0 on SIGTERM, with the
requests that run then answered.

Prints a summary; --json FILE writes it. The status is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from measurement import MistakeError, machine_facts, notice, positive_int, run_script, write_json
from soak.bodies import asks
from soak.child import Child
from soak.clients import Clients
from soak.tally import Tally, content_of
from soak.wire import connection, read_answer, request

MAX_GROWTH_MB = 16.0  # of resident memory, from the second minute to the last
NUM_ASKS = 80
QUEUE = 192
OPTIONS = ["--num-blocks", "1024", "--max-num-seqs", "64", "--max-waiting", str(QUEUE), "--drain-seconds", "60"]
IDLE_SECONDS = 120.0  # for the server to finish what clients have left
SAMPLE_SECONDS = 2.0


@dataclass
class Soak:
    """One run.

    Args:
        child: the server, if it is ours.
        max_requests: the clients stop after so many requests, if not by the time.
    """

    host: str
    port: int
    child: Child | None
    seed: int
    num_clients: int
    seconds: float
    max_requests: int | None = None
    tally: Tally = field(default_factory=Tally)
    memory: list[tuple[float, float]] = field(default_factory=list)  # (seconds since the start, MB)

    async def run(self) -> dict[str, Any]:
        """All of it; the facts that were found."""
        rng = random.Random(self.seed)
        idle_seconds = min(20.0, self.seconds / 10)
        clients = Clients(self.host, self.port, rng, asks(rng, NUM_ASKS), self.tally, QUEUE + 108, idle_seconds)
        notice(f"{len(clients.asks)} requests alone ...")
        for ask in clients.asks:
            answer = await clients.ask(ask.whole)
            if answer.status != 200:
                raise MistakeError(f"the server refuses {ask.body}: {answer.body.decode()[:300]}")
            self.tally.alone[ask] = content_of(ask.whole, answer)
        notice(f"{self.num_clients} clients ...")
        start = time.monotonic()
        watching = asyncio.create_task(self._watch(start))
        await clients.run(self.num_clients, lambda: time.monotonic() - start >= self.seconds or self._enough())
        elapsed = time.monotonic() - start
        watching.cancel()
        await self._come_to_rest()
        for ask in clients.asks:  # and alone again
            self.tally.note(ask, await clients.ask(ask))
        facts = self._facts(elapsed)
        if self.child is not None:
            facts["exit_status"] = await self._end(clients)
        return facts

    def _enough(self) -> bool:
        return self.max_requests is not None and self.tally.num_requests >= self.max_requests

    async def _watch(self, start: float) -> None:
        """Samples the memory, and says how it goes."""
        said = start
        while self.child is not None and self.child.alive:
            now = time.monotonic()
            self.memory.append((now - start, self.child.memory_mb()))
            if now - said >= 30:
                said = now
                notice(
                    f"{now - start:5.0f} s: {self.tally.num_requests} requests, {len(self.tally.faults)} faults, "
                    f"{self.memory[-1][1]:.0f} MB, {self.child.num_files()} files"
                )
            await asyncio.sleep(SAMPLE_SECONDS)

    async def get(self, path: str) -> tuple[int, bytes]:
        async with connection(self.host, self.port) as (reader, writer):
            writer.write(request("GET", path))
            answer = await read_answer(reader)
            return answer.status, answer.body

    async def _come_to_rest(self) -> None:
        """Waits until the server holds nothing; a fault if it goes on doing so."""
        deadline = time.monotonic() + IDLE_SECONDS
        while True:
            try:
                found = gauges((await self.get("/metrics"))[1].decode())
                healthy = (await self.get("/health"))[0] == 200
            except (OSError, EOFError) as error:
                self.tally.faults.append(f"the server is gone: {error!r}")
                return
            if healthy and not any(found.values()):
                return
            if time.monotonic() > deadline:
                self.tally.faults.append(f"not idle {IDLE_SECONDS:g} s after the last client: {found}")
                return
            await asyncio.sleep(0.2)

    async def _end(self, clients: Clients) -> int | None:
        """SIGTERM while requests run: they are answered, new ones are not, and the status is 0."""
        assert self.child is not None
        last = [ask for ask in clients.asks if ask.path == "/v1/completions"][:16]
        running = [asyncio.create_task(clients.ask(ask)) for ask in last]
        while gauges((await self.get("/metrics"))[1].decode())["tinyllm:num_requests_running"] == 0:
            if all(task.done() for task in running):
                break
            await asyncio.sleep(0.001)
        self.child.terminate()
        for ask, answer in zip(last, await asyncio.gather(*running, return_exceptions=True), strict=True):
            if isinstance(answer, BaseException):
                self.tally.faults.append(f"a request at the end was cut off: {answer!r}")
            else:
                self.tally.note(ask, answer)
        status = await asyncio.to_thread(self.child.wait, 90.0)
        if status != 0:
            self.tally.faults.append(f"after SIGTERM the server's exit status is {status}")
        if "Traceback" in self.child.log:
            self.tally.faults.append(f"the server's log has a traceback: {self.child.log[-3000:]}")
        return status

    def _facts(self, elapsed: float) -> dict[str, Any]:
        tally = self.tally
        facts: dict[str, Any] = {
            "clients": self.num_clients,
            "seconds": round(elapsed, 1),
            "seed": self.seed,
            "requests": tally.num_requests,
            "answered": dict(sorted(tally.answered.items())),
            "refused": {str(status): count for status, count in sorted(tally.refused.items())},
            "left": dict(sorted(tally.left.items())),
            "compared_with_the_same_request_alone": tally.num_compared,
        }
        if len(self.memory) >= 10:
            early, late = growth(self.memory)
            facts["memory_mb"] = {"early": round(early, 1), "late": round(late, 1), "growth": round(late - early, 1)}
            facts["peak_memory_mb"] = round(max(value for _, value in self.memory), 1)
            if late - early > MAX_GROWTH_MB:
                tally.faults.append(f"the server's memory grew by {late - early:.1f} MB; allowed: {MAX_GROWTH_MB:g}")
        if self.child is not None:
            facts["open_files_at_rest"] = self.child.num_files()
        return facts


def gauges(metrics: str) -> dict[str, float]:
    """What must be 0 of an idle server."""
    names = ("tinyllm:num_requests_running", "tinyllm:num_requests_waiting", "tinyllm:kv_cache_usage_perc")
    found = {}
    for line in metrics.splitlines():
        name = line.partition("{")[0]
        if name in names:
            found[name] = float(line.rpartition(" ")[2])
    if set(found) != set(names):
        raise MistakeError(f"/metrics has only {sorted(found)} of {names}")
    return found


def growth(samples: list[tuple[float, float]]) -> tuple[float, float]:
    """Medians of the memory in the second minute and in the last; of a run under four minutes, in quarters of it."""
    end = samples[-1][0]
    span = min(60.0, end / 4)
    early = [value for at, value in samples if span <= at < 2 * span]
    late = [value for at, value in samples if at >= end - span]
    return statistics.median(early), statistics.median(late)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--clients", type=positive_int, default=200, metavar="N", help="at a time (200)")
    add("--seconds", type=positive_int, default=600, metavar="N", help="how long they go on (600)")
    add("--requests", type=positive_int, metavar="N", help="end after so many requests, if not by the time")
    add("--seed", type=int, default=0, metavar="N", help="of what the clients do (0)")
    add("--model", default="tales-4m", help="a registered name, a GGUF file or a folder (tales-4m)")
    add("--base-url", metavar="URL", help="a server that runs already; its memory and its end are not looked at")
    add("--json", metavar="FILE", help="where to write the summary")
    args = parser.parse_args()
    with ExitStack() as stack:
        child = None
        if args.base_url is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tinyllm-soak-")))
            child = Child(args.model, OPTIONS, folder)
            stack.callback(child.kill)
            host, port = child.host, child.port
        else:
            url = urlsplit(args.base_url)
            if url.scheme != "http" or url.hostname is None:
                raise MistakeError(f"--base-url must be http://HOST:PORT, not {args.base_url!r}")
            host, port = url.hostname, url.port or 80
        soak = Soak(host, port, child, args.seed, args.clients, args.seconds, args.requests)
        facts = asyncio.run(soak.run())
    facts["faults"] = soak.tally.faults[:100]
    for name, value in facts.items():
        if name != "faults":
            print(f"{name.replace('_', ' ')}: {value}")
    print(f"faults: {len(soak.tally.faults)}")
    for fault in soak.tally.faults[:20]:
        print(f"  {fault[:1000]}")
    if args.json is not None:
        write_json(Path(args.json), {"machine": machine_facts(None), **facts})
    if soak.tally.faults:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
