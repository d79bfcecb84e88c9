"""`tinyllm bench serve`: load on an OpenAI-compatible server, and what its clients see of it."""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tinyllm.cli import bench_serve_options as options, console
from tinyllm.cli.console import UsageError
from tinyllm.cli.facts import OthersMeter, machine_facts
from tinyllm.errors import reason

if TYPE_CHECKING:
    from tinyllm.loadgen.measurements import Measurements
    from tinyllm.loadgen.openai_client import OpenAIClient
    from tinyllm.loadgen.record import RequestRecord
    from tinyllm.loadgen.workload import Workload

__all__ = ["add_parser"]

_SETTINGS = (
    *("rate", "concurrency", "num_requests", "duration", "seed", "prompt_lengths", "output_lengths", "shared_prefix"),
    *("token_ids", "input", "chat", "ignore_eos", "temperature", "extra_body", "retry", "timeout", "warmup", "goodput"),
)
_WARM_UP_TOKENS = 4


def add_parser(commands: Any, bench: argparse.ArgumentParser) -> None:
    """bench: the parser of the command that this is a part of; its own options may not be given here."""
    parser = commands.add_parser(
        "serve",
        help="load on an OpenAI-compatible server (see: tinyllm bench serve --help)",
        description="Sends requests to an OpenAI-compatible server and measures what its clients see.",
        epilog=options.EPILOG,
    )
    options.add_options(parser)
    parser.set_defaults(run=functools.partial(run, bench=bench))


def run(args: argparse.Namespace, bench: argparse.ArgumentParser) -> int:
    _refuse_options_of_bench(args, bench)
    options.check(args)
    try:
        from tinyllm.loadgen import http_client as _  # noqa: F401
    except ImportError as error:
        raise UsageError(f"bench serve needs httptools ({error}): pip install 'tinyllm[serve]'") from None
    from tinyllm.loadgen.measurements import Measurements
    from tinyllm.loadgen.report import format_report
    from tinyllm.loadgen.statistics import Goodput

    workload = options.workload(args)
    measurements = Measurements(Goodput.parse(args.goodput))
    others, cpu = OthersMeter(), _CpuMeter()
    interrupted = False
    with ExitStack() as files:
        on_record = measurements.add if args.save is None else _saving(args.save, measurements.add, files)
        try:
            asyncio.run(_measure(args, workload, measurements, on_record, cpu))
        except KeyboardInterrupt:
            if not measurements.begin:
                raise
            interrupted = True
    report = measurements.as_json() | {"client": cpu.as_json(measurements.chunks)}
    if args.as_json:
        facts = _facts(args, workload) | {"others_cpu_share": others.share(), "was_interrupted": interrupted}
        console.write(json.dumps(facts | report) + "\n")
    else:
        console.write(format_report(report))
    if interrupted:
        raise KeyboardInterrupt
    return 0 if measurements.completed else options.EXIT_ALL_FAILED


async def _measure(
    args: argparse.Namespace,
    workload: Workload,
    measurements: Measurements,
    on_record: Callable[[RequestRecord], None],
    cpu: _CpuMeter,
) -> None:
    from tinyllm.loadgen.driver import run_closed_loop, run_open_loop
    from tinyllm.loadgen.http_client import HTTPClient
    from tinyllm.loadgen.openai_client import OpenAIClient, RequestSettings, list_models
    from tinyllm.loadgen.url import ServerURL

    http = HTTPClient(ServerURL.parse(args.base_url), api_key=args.api_key)
    try:
        names = await list_models(http)
        if args.served_model is None:
            args.served_model = names[0]
        elif args.served_model not in names:
            raise UsageError(f"{http.url} has no model {args.served_model!r}, but {', '.join(names[:8])}")
        settings = RequestSettings(
            *(args.served_model, args.chat, args.ignore_eos, args.temperature),
            extra_body=args.extra_body,
            retries=args.retry,
            timeout=args.timeout,
        )
        client = OpenAIClient(http, settings, on_record)
        await _warm_up(client, args.warmup, workload)
        console.notice(f"requests go to {http.url}{settings.path}, model {args.served_model}")
        cpu.start()
        if args.rate is None:
            await run_closed_loop(client, workload, measurements, args.duration, args.concurrency)
        else:
            await run_open_loop(client, workload, measurements, args.duration)
    finally:
        cpu.stop()
        http.close()


async def _warm_up(client: OpenAIClient, requests: int, workload: Workload) -> None:
    """With prompts that no other request's begins with, so that a prefix cache learns nothing."""
    for _ in range(requests):
        await client.warm_up("Hello" if workload.text else list(reversed(workload.token_ids)), _WARM_UP_TOKENS)


class _CpuMeter:
    """The CPU time of this process between start and stop: what the load generator takes from a server beside it."""

    def __init__(self) -> None:
        self._begin: float | None = None
        self._seconds = 0.0

    def start(self) -> None:
        self._begin = time.process_time()

    def stop(self) -> None:
        if self._begin is not None:
            self._seconds = time.process_time() - self._begin

    def as_json(self, chunks: int) -> dict[str, Any]:
        cost = 1e6 * self._seconds / chunks if chunks else None
        return {"cpu_seconds": self._seconds, "cpu_microseconds_per_chunk": cost}


def _saving(path: str, add: Callable[[RequestRecord], None], files: ExitStack) -> Callable[[RequestRecord], None]:
    """`add`, and a line in the file. Raises UsageError."""
    file = files.enter_context(_create(path))

    def on_record(record: RequestRecord) -> None:
        add(record)
        try:
            file.write(json.dumps(record.as_json()) + "\n")
            file.flush()
        except OSError as error:
            raise UsageError(f"cannot write {path}: {reason(error)}") from None

    return on_record


def _create(path: str) -> TextIO:
    """Raises UsageError."""
    try:
        return Path(path).open("w", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {path}: {reason(error)}") from None


def _refuse_options_of_bench(args: argparse.Namespace, bench: argparse.ArgumentParser) -> None:
    """Raises UsageError if options came before `serve`, where they would be those of `bench` and be lost."""
    for name, default in vars(bench.parse_args([])).items():
        if name != "run" and getattr(args, name) != default:
            raise UsageError("options before `serve` are those of `bench` alone: put those of `bench serve` after it")


def _facts(args: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """What was measured, where and when."""
    settings = {name: getattr(args, name) for name in _SETTINGS}
    settings |= {
        "rate": None if args.rate is None else str(args.rate) if args.rate == float("inf") else args.rate,
        "prompt_lengths": None if args.input is not None else workload.prompt_lengths.text,
        "output_lengths": workload.output_lengths.text,
        "shared_prefix": workload.shared_prefix,
        "token_ids": None if workload.text else list(workload.token_ids),
    }
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "server": args.base_url,
        "model": args.served_model,
        "machine": machine_facts(1),
        "settings": settings,
    }
