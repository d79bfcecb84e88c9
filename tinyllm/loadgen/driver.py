"""Sends a workload's requests: at their times whatever the server does, or as clients become free."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable, Iterator

from tinyllm.loadgen.measurements import Measurements
from tinyllm.loadgen.openai_client import OpenAIClient
from tinyllm.loadgen.workload import PlannedRequest

__all__ = ["run_closed_loop", "run_open_loop"]


async def run_open_loop(
    client: OpenAIClient, requests: Iterable[PlannedRequest], measurements: Measurements, duration: float | None
) -> None:
    """Sends each request at its arrival, until they end or `duration` seconds are over; waits for the last answer."""
    clock = client.clock
    measurements.begin = measurements.end = begin = clock()
    tasks: set[asyncio.Task[None]] = set()
    try:
        for request in requests:
            if duration is not None and request.arrival >= duration:
                break
            body = client.prepare(request)
            await asyncio.sleep(max(0.0, begin + request.arrival - clock()))
            task = asyncio.create_task(client.send(request, body, begin))
            tasks.add(task)
            task.add_done_callback(functools.partial(_forget, tasks))
        await _join(tasks)
    finally:
        measurements.end = clock()
        await _cancel(tasks)


async def run_closed_loop(
    client: OpenAIClient,
    requests: Iterable[PlannedRequest],
    measurements: Measurements,
    duration: float | None,
    concurrency: int,
) -> None:
    """So many clients, each of which sends its next request when the last is answered."""
    clock = client.clock
    measurements.begin = measurements.end = begin = clock()
    shared = iter(requests)
    tasks = {asyncio.create_task(_one_client(client, shared, begin, duration)) for _ in range(concurrency)}
    try:
        await _join(tasks)
    finally:
        measurements.end = clock()
        await _cancel(tasks)


async def _one_client(
    client: OpenAIClient, requests: Iterator[PlannedRequest], begin: float, duration: float | None
) -> None:
    for request in requests:  # shared by all clients
        if duration is not None and client.clock() - begin >= duration:
            return
        await client.send(request, client.prepare(request), begin)


def _forget(tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is None:
        tasks.discard(task)


async def _join(tasks: set[asyncio.Task[None]]) -> None:
    """Waits for all. What one raises is a bug, and is not lost."""
    await asyncio.gather(*tasks)


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
