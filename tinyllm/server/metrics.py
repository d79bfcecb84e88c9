"""What Prometheus reads of a server: names and units in the style that dashboards for such engines use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.outputs import RequestOutput

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """A registry of its own for each server, so that two of them in one process do not meet.

    A RequestObserver: its methods are called on the engine's thread.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        labels = ["model_name"]

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(f"tinyllm:{name}", what, labels, buckets=buckets, registry=self.registry)
            return metric.labels(model_name)

        def counter(name: str, what: str) -> Counter:
            return Counter(f"tinyllm:{name}", what, labels, registry=self.registry).labels(model_name)

        self._queue_time = histogram("request_queue_time_seconds", "Time in the queue.", _SECONDS)
        self._first_token = histogram("time_to_first_token_seconds", "Time to the first token.", _SECONDS)
        self._between = histogram("inter_token_latency_seconds", "Time between tokens.", _BETWEEN)
        self._latency = histogram("e2e_request_latency_seconds", "Time from arrival to end.", _SECONDS)
        self._prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._output_length = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._cached_tokens = counter("prompt_tokens_cached", "Prompt tokens that the prefix cache had.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._refused = counter("request_refused", "Requests refused because the queue was full.")
        self._ended = Counter(
            "tinyllm:request_success",
            "Requests ended, by the reason.",
            [*labels, "finished_reason"],
            registry=self.registry,
        )
        self._model_name = model_name

    def watch(self, engine: LLMEngine, *, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Adds what is read when it is asked for: the queue, the steps, and how full the KV cache is."""
        blocks = engine.block_manager
        self.registry.register(_EngineCounters(engine, self._model_name))

        def gauge(name: str, what: str, value: Callable[[], float]) -> None:
            metric = Gauge(f"tinyllm:{name}", what, ["model_name"], registry=self.registry)
            metric.labels(self._model_name).set_function(value)

        gauge("num_requests_waiting", "Requests that wait to be started.", waiting)
        gauge("num_requests_running", "Requests that run.", running)
        gauge("num_kv_blocks", "Blocks of the KV cache.", lambda: blocks.num_blocks)
        gauge(
            "kv_cache_usage_perc",
            "The part of the KV cache's blocks that is held, from 0 to 1.",
            lambda: 1 - blocks.num_free_blocks / blocks.num_blocks,
        )

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    # ---- RequestObserver

    def request_started(self, arrival_time: float, now: float) -> None:
        self._queue_time.observe(now - arrival_time)

    def tokens_streamed(self, num_tokens: int, previous_time: float | None, arrival_time: float, now: float) -> None:
        self._generated.inc(num_tokens)
        if previous_time is None:
            self._first_token.observe(now - arrival_time)
        else:
            self._between.observe(now - previous_time)

    def request_ended(self, output: RequestOutput, arrival_time: float, now: float) -> None:
        self._latency.observe(now - arrival_time)
        self._prompt_tokens.inc(len(output.prompt_token_ids))
        self._cached_tokens.inc(output.num_cached_tokens)
        self._prompt_length.observe(len(output.prompt_token_ids))
        self._output_length.observe(sum(len(one.token_ids) for one in output.outputs))
        reason = output.outputs[0].finish_reason if output.outputs else None
        self._ended.labels(self._model_name, reason or "stop").inc()

    def request_refused(self) -> None:
        self._refused.inc()


class _EngineCounters:
    """Counts that the engine keeps anyway."""

    def __init__(self, engine: LLMEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[CounterMetricFamily]:
        for name, what, value in (
            ("num_steps", "Steps of the engine.", self._engine.num_steps),
            ("num_preemptions", "Sequences that lost their blocks to others.", self._engine.num_preemptions),
        ):
            family = CounterMetricFamily(f"tinyllm:{name}", what, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
