"""What Prometheus reads, against what was asked of the server."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.server.serving import Server, serving


def samples(server: Server) -> dict[str, float]:
    """Name and labels besides the model's -> value."""
    with urllib.request.urlopen(f"{server.base_url}/metrics") as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tales-4m"
            rest = [value for name, value in sorted(sample.labels.items()) if name != "model_name"]
            found[" ".join([sample.name, *rest])] = sample.value
    return found


def post(server: Server, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.base_url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def test_the_counters_say_what_happened() -> None:
    with serving(num_blocks=64) as server:
        prompt = list(range(50, 90))
        post(server, prompt=prompt, max_tokens=7, ignore_eos=True)
        post(server, prompt=prompt, max_tokens=5, n=2, ignore_eos=True)
        found = samples(server)
        one = "tinyllm:"
        assert found[f"{one}prompt_tokens_total"] == 80
        assert found[f"{one}prompt_tokens_cached_total"] == 32
        assert found[f"{one}generation_tokens_total"] == 7 + 2 * 5
        assert found[f"{one}request_success_total length"] == 2
        assert found[f"{one}request_success_created length"] > 0
        assert found[f"{one}time_to_first_token_seconds_count"] == 3  # one a continuation
        assert found[f"{one}inter_token_latency_seconds_count"] == 6 + 2 * 4
        assert found[f"{one}e2e_request_latency_seconds_count"] == 2
        assert found[f"{one}request_queue_time_seconds_count"] == 2
        assert found[f"{one}request_generation_tokens_sum"] == 17
        assert found[f"{one}request_prompt_tokens_bucket 20.0"] == 0
        assert found[f"{one}request_prompt_tokens_bucket 50.0"] == 2
        assert found[f"{one}num_steps_total"] == 7 + 5
        assert found[f"{one}num_kv_blocks"] == 64
        assert found[f"{one}num_preemptions_total"] == found[f"{one}request_refused_total"] == 0
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert found[one + gauge] == 0


def test_gauges_show_what_waits_and_what_is_held() -> None:
    with serving(num_blocks=16) as server:
        engine = server.service.engine
        engine.pause()
        before = engine.call(lambda inner: inner.num_steps).result()
        body = json.dumps({"prompt": list(range(100)), "max_tokens": 3}).encode()
        requests = [
            urllib.request.Request(f"{server.base_url}/v1/completions", body, {"Content-Type": "application/json"})
            for _ in range(2)
        ]
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(urllib.request.urlopen, request) for request in requests]
            while samples(server)["tinyllm:num_requests_waiting"] < 2:
                pass
            assert samples(server)["tinyllm:kv_cache_usage_perc"] == 0
            engine.single_step()
            while engine.call(lambda inner: inner.num_steps).result() == before:
                pass
            found = samples(server)
            assert found["tinyllm:num_requests_running"] == 2
            assert found["tinyllm:num_requests_waiting"] == 0
            assert (
                found["tinyllm:kv_cache_usage_perc"] == 8 / 16
            )  # 7 blocks of 16 tokens, 6 of them shared, and an end each
            engine.resume()
            assert all(answer.result().status == 200 for answer in answers)


def test_preemptions_are_counted() -> None:
    with serving(num_blocks=8, block_size=16, prefix_caching=False) as server:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(
                    lambda i: post(server, prompt=[i + 1] * 10, max_tokens=100, ignore_eos=True),
                    range(4),
                )
            )
        assert samples(server)["tinyllm:num_preemptions_total"] > 0
