"""`tinyllm serve` as a process of its own: how it starts, refuses to start, and ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tinyllm", "serve", "--model", "tales-4m", "--device", "cpu", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **more,
    }


@contextmanager
def process(*arguments: str, **more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server and its port."""
    child = subprocess.Popen(
        command("--port", "0", *arguments), stderr=subprocess.PIPE, text=True, env=environment(**more)
    )
    try:
        assert child.stderr is not None
        for line in child.stderr:
            if found := re.search(r"is served at http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise AssertionError(f"it ended with {child.wait()}")
        port = int(found[1])
        _until_it_answers(port)
        yield child, port
    finally:
        child.kill()
        child.wait()


def _until_it_answers(port: int) -> None:
    """The socket listens before the application runs; the first answer waits for that."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer:
        assert json.load(answer) == {"status": "ok"}


def begin(port: int, **fields: Any) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"prompt": "Once upon a time", "ignore_eos": True, **fields})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection.getresponse()


def test_on_sigterm_a_running_stream_finishes_and_new_requests_are_refused() -> None:
    with process() as (child, port):
        stream = begin(port, max_tokens=700, stream=True)
        assert stream.status == 200
        assert stream.readline().startswith(b"data: ")
        keep = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        keep.request("GET", "/health")
        assert keep.getresponse().read() == b'{"status":"ok"}'
        child.send_signal(signal.SIGTERM)
        statuses = []
        while not statuses or statuses[-1] == b'{"status":"ok"}':  # the signal is on its way
            keep.request("GET", "/health")
            statuses.append(keep.getresponse().read())
        assert statuses[-1] == b'{"status":"draining"}'
        keep.request("POST", "/v1/completions", '{"prompt": "x"}', {"Content-Type": "application/json"})
        refused = keep.getresponse()
        assert refused.status == 503 and refused.getheader("Retry-After") is not None
        assert "about to stop" in json.load(refused)["error"]["message"]
        rest = stream.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in rest
        assert rest.count(b'"text":') > 300
        assert child.wait(60) == 0


def test_what_does_not_finish_in_time_is_ended_cleanly() -> None:
    with process("--drain-seconds", "0") as (child, port):
        stream = begin(port, max_tokens=900, stream=True)
        stream.readline()
        child.send_signal(signal.SIGTERM)
        rest = stream.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert child.wait(60) == 0


def test_ctrl_c_ends_an_idle_server_at_once() -> None:
    with process() as (child, _):
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 0


def test_a_second_signal_does_not_wait() -> None:
    with process("--drain-seconds", "1000") as (child, port):
        stream = begin(port, max_tokens=900, stream=True, window=64)
        stream.readline()
        for _ in range(50):
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                continue
        assert child.wait(60) in (0, -signal.SIGTERM)


def test_keys_come_from_the_environment_too() -> None:
    with process("--api-key", "first-secret", TINYLLM_API_KEYS="second-secret, third-secret") as (_, port):
        found = []
        for key in ("first-secret", "second-secret", "third-secret", "other-secret", ""):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
            found.append(connection.getresponse().status)
        assert found == [200, 200, 200, 401, 401]


def test_a_server_of_this_machine_alone_answers_to_no_other_name() -> None:
    with process("--allow-host", "Example.org") as (_, port):
        found = {}
        for host in (
            "localhost",
            f"127.0.0.1:{port}",
            "[::1]:80",
            "example.org",
            "example.org:99",
            "evil.org",
            "",
            "::1",
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/health", headers={"Host": host})
            found[host] = connection.getresponse().status
        assert [host for host, status in found.items() if status != 200] == ["evil.org", "", "::1"]
        assert found["evil.org"] == 421


def run_to_its_end(*arguments: str, **more: str) -> tuple[int, str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(**more), timeout=120)
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "70000"), "--port must be from 0 to 65535, not 70000"),
        (("--host", "no.such.host.invalid"), "there is no address 'no.such.host.invalid'"),
        (("--api-key", "short"), "an API key needs 8 or more printable ASCII characters"),
        (("--max-waiting", "0"), "--max-waiting must be a positive integer, not 0"),
        (("--drain-seconds", "nan"), "--drain-seconds must be a number of seconds, not nan"),
        (("--num-blocks", "0"), "--num-blocks must be an integer from 1"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    status, said = run_to_its_end("--port", "0", *arguments)
    assert status == 2
    assert message in said and said.count("\n") == 1


def test_a_port_that_is_taken_is_named_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, said = run_to_its_end("--port", str(port), "--model", "no-such-model")
    assert status == 2
    assert said == f"tinyllm: error: cannot listen at 127.0.0.1 port {port}: another program listens there\n"


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError('not here', name='fastapi')")
    status, said = run_to_its_end(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert status == 2
    assert said == "tinyllm: error: serving needs fastapi: pip install 'tinyllm[serve]'\n"
