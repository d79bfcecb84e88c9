"""What a load generator sends, and when."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tinyllm.loadgen.errors import LoadError
from tinyllm.loadgen.lengths import MAX_LENGTH, Lengths
from tinyllm.loadgen.prompts import read_prompts
from tinyllm.loadgen.url import ServerURL
from tinyllm.loadgen.workload import Workload


def workload(**fields: Any) -> Workload:
    lengths = {name: Lengths.parse(fields.pop(name, "4:9"), name) for name in ("prompt_lengths", "output_lengths")}
    return Workload(**{"num_requests": 50, "rate": None, **lengths, **fields})


def test_arrivals_are_a_poisson_process() -> None:
    rate = 5.0
    arrivals = [request.arrival for request in workload(rate=rate, num_requests=20_000, prompt_lengths="1")]
    gaps = np.array([later - earlier for earlier, later in pairwise(arrivals)])
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.03)
    assert gaps.std() == pytest.approx(1 / rate, rel=0.04)
    assert np.mean(gaps > 1 / rate) == pytest.approx(np.exp(-1), rel=0.05)
    counts = np.histogram(arrivals, bins=np.arange(0, arrivals[-1], 2.0))[0]
    assert counts.mean() == pytest.approx(2 * rate, rel=0.03)
    assert counts.var() == pytest.approx(2 * rate, rel=0.1)  # as the mean: no other process has that
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03


def test_the_same_seed_gives_the_same_requests() -> None:
    for fields in ({"rate": 3.0}, {"text": True, "shared_prefix": 7}, {"rate": float("inf")}):
        assert list(workload(seed=1, **fields)) == list(workload(seed=1, **fields))
        assert list(workload(seed=1, **fields)) != list(workload(seed=2, **fields))


def test_random_numbers_of_one_kind_leave_the_others_alone() -> None:
    one, other = workload(rate=3.0), workload(rate=3.0, prompt_lengths="400:900,7,8", shared_prefix=3)
    assert [r.arrival for r in one] == [r.arrival for r in other]
    assert [r.max_tokens for r in one] == [r.max_tokens for r in other]
    slower = [r.arrival for r in workload(rate=1.5)]
    assert slower == pytest.approx([2 * r.arrival for r in one])
    assert [r.prompt for r in workload(rate=float("inf"))] == [r.prompt for r in one]


def test_a_workload_without_a_number_has_no_end() -> None:
    requests = list(islice(workload(num_requests=None), 200))
    assert [request.index for request in requests] == list(range(200))
    assert requests[:50] == list(workload())


def test_prompts_are_ids_of_the_range_after_a_shared_prefix() -> None:
    requests = list(workload(shared_prefix=6, prompt_lengths="2:5", token_ids=(10, 12)))
    first = requests[0].prompt
    assert isinstance(first, list)
    for request in requests:
        assert isinstance(request.prompt, list)
        assert request.prompt[:6] == first[:6]
        assert 8 <= len(request.prompt) <= 11
        assert set(request.prompt) <= {10, 11, 12}
    assert len({tuple(r.prompt[6:]) for r in requests if isinstance(r.prompt, list)}) > 20
    assert {token for r in requests for token in r.prompt if isinstance(token, int)} == {10, 11, 12}
    json.dumps([r.prompt for r in requests])  # plain integers


def test_texts_have_as_many_words() -> None:
    requests = list(workload(text=True, shared_prefix=3, prompt_lengths="5"))
    assert {len(str(request.prompt).split(" ")) for request in requests} == {8}
    assert len({" ".join(str(request.prompt).split(" ")[:3]) for request in requests}) == 1
    assert {len(str(r.prompt).split(" ")) for r in workload(text=True, prompt_lengths="5")} == {5}


def test_prompts_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff{"prompt": "a"}\n\n{"prompt_token_ids": [1, 2], "max_tokens": 3}\r\n', encoding="utf-8")
    prompts = read_prompts(str(file), chat=False)
    requests = list(workload(prompts=prompts, num_requests=5, output_lengths="9", rate=2.0))
    assert [(r.prompt, r.max_tokens) for r in requests] == [("a", 9), ([1, 2], 3), ("a", 9), ([1, 2], 3), ("a", 9)]
    messages = [{"role": "user", "content": "x"}]
    file.write_text(json.dumps({"messages": messages}))
    assert read_prompts(str(file), chat=True)[0].prompt == messages


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", "there is no prompt"),
        ("{", "invalid JSON"),
        ("[" * 100_000, "invalid JSON"),
        (b"\xff", "invalid JSON"),
        ("[]", "object"),
        ("{}", "expected one of"),
        ('{"prompt": "a", "messages": []}', "expected one of"),
        ('{"prompt": "a", "temperature": 1}', "expected one of"),
        ('{"prompt": 1}', "string"),
        ('{"prompt_token_ids": [1, true]}', "integers"),
        ('{"prompt_token_ids": []}', "integers"),
        ('{"messages": [{}]}', "--chat"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens"),
    ],
)
def test_lines_that_are_no_prompts(line: str | bytes, named: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes((b'{"prompt": "a"}\n' if line else b"") + (line.encode() if isinstance(line, str) else line))
    with pytest.raises(LoadError, match=named) as caught:
        read_prompts(str(file), chat=False)
    assert (f"{file}:2:" if line else str(file)) in str(caught.value)


def test_prompts_that_a_chat_cannot_have(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"prompt_token_ids": [1]}')
    with pytest.raises(LoadError, match="a chat has no"):
        read_prompts(str(tmp_path / "a"), chat=True)
    with pytest.raises(LoadError, match="cannot read"):
        read_prompts(str(tmp_path / "none"), chat=True)


@given(st.integers(1, MAX_LENGTH), st.integers(0, 5000), st.booleans(), st.integers(0, 99))
def test_lengths_stay_in_their_range(low: int, more: int, log_normal: bool, seed: int) -> None:
    high = min(low + more, MAX_LENGTH)
    text = f"{'lognormal:' if log_normal else ''}{low}:{high}"
    lengths, random = Lengths.parse(text, "--x"), np.random.default_rng(seed)
    assert lengths.text == text
    assert lengths.longest == high
    for _ in range(20):
        assert low <= lengths.draw(random) <= high


def test_uniform_lengths_have_both_ends() -> None:
    lengths, random = Lengths.parse("3:6", "--x"), np.random.default_rng(0)
    counts = np.bincount([lengths.draw(random) for _ in range(8000)])
    assert counts[:3].sum() == 0
    assert counts[3:] == pytest.approx(2000, rel=0.1)


def test_log_normal_lengths() -> None:
    lengths, random = Lengths.parse("lognormal:20:2000", "--x"), np.random.default_rng(0)
    drawn = np.array([lengths.draw(random) for _ in range(20_000)])
    assert np.median(drawn) == pytest.approx(200, rel=0.05)
    assert drawn.mean() > 300  # the long tail
    logs = np.log(drawn)
    assert logs.std() == pytest.approx(np.log(10) / 1.96, rel=0.05)
    assert np.mean((drawn == 20) | (drawn == 2000)) == pytest.approx(0.05, abs=0.01)


def test_mixtures() -> None:
    lengths, random = Lengths.parse("10:20@3, 8000", "--x"), np.random.default_rng(0)
    drawn = np.array([lengths.draw(random) for _ in range(8000)])
    assert np.mean(drawn == 8000) == pytest.approx(0.25, abs=0.02)
    assert set(drawn[drawn != 8000]) == set(range(10, 21))
    assert Lengths.parse("7@0,5", "--x").draw(random) == 5


@given(st.text(alphabet="0123456789:,@.lognrma -x٣", max_size=14))
def test_any_text_is_lengths_or_a_mistake(text: str) -> None:
    message, drawn = "--x", 1
    try:
        drawn = Lengths.parse(text, "--x").draw(np.random.default_rng(0))
    except LoadError as error:
        message = str(error)
    assert message.startswith("--x")
    assert 1 <= drawn <= MAX_LENGTH


@pytest.mark.parametrize(
    "text", ["", "0", "9:3", "1:", ":1", "1-2", "1.5", "-1", "1,,2", "lognormal:5", "1_0", "3@", "3@0", "٣", "9" * 10]
)
def test_lengths_that_cannot_be(text: str) -> None:
    with pytest.raises(LoadError, match="--x"):
        Lengths.parse(text, "--x")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_requests": 0}, "--num-requests"),
        ({"rate": 0.0}, "--rate"),
        ({"rate": float("nan")}, "--rate"),
        ({"rate": -1.0}, "--rate"),
        ({"shared_prefix": -1}, "--shared-prefix"),
        ({"token_ids": (5, 4)}, "--token-ids"),
        ({"token_ids": (-1, 4)}, "--token-ids"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_workloads_that_cannot_be(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(LoadError, match=named):
        workload(**fields)


def test_urls() -> None:
    assert str(ServerURL.parse("http://127.0.0.1:8000")) == "http://127.0.0.1:8000"
    assert str(ServerURL.parse("https://host/v1/")) == "https://host"
    assert ServerURL.parse("https://host").port == 443
    assert ServerURL.parse("http://host/a/v1") == ServerURL("http", "host", 80, "/a")
    assert ServerURL.parse("http://[::1]:80/").netloc == "[::1]"
    assert ServerURL.parse("http://[::1]:8000/").netloc == "[::1]:8000"


@pytest.mark.parametrize(
    "text",
    [
        *("", "host:8000", "ftp://host", "http://", "http://host:99999", "http://[::1", "http://me:pw@host"),
        *("http://h?a=1", "http://h\u00e9", "http://host/a b"),
    ],
)
def test_urls_that_cannot_be(text: str) -> None:
    with pytest.raises(LoadError):
        ServerURL.parse(text)


def test_a_url_brings_no_lines_into_a_request() -> None:
    assert ServerURL.parse("http://host/\r\nX: y".replace(" ", "")).path == "/X:y"
