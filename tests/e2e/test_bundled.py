"""The model that comes with tinyllm: its files, its card, its tokenizer, and that it writes tales in English."""

from __future__ import annotations

import re
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FIXTURES
from tests.e2e.golden import Golden
from tests.e2e.test_real_models import load
from tinyllm import LLM, InvalidRequestError, SamplingParams, TokenizerError
from tinyllm.bundled import FILES
from tinyllm.cli import main

ROOT = Path(__file__).parents[2]
MOST_NBYTES = 12_000_000

BEGINNINGS = [
    "Once upon a time",
    "There was once a little girl who",
    "The old king had three sons, and the youngest",
    "One day the rabbit",
]
TALE = (
    "Once upon a time there was a poor old woman who lived in a little house near the forest. One morning she went "
    'out to gather wood, and there she saw a great bird sitting upon a tree. "Good morning," said the bird. "What do '
    'you want in the forest so early in the day?" "I want a little wood for my fire," said the old woman, "for I am '
    'very cold."'
)


@pytest.fixture(scope="module")
def llm(bundled_path: Path) -> LLM:
    return load(bundled_path)


# ---- the files


def test_the_files_are_small(bundled_path: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in bundled_path.iterdir()}
    assert sizes.keys() >= {*FILES, "README.md"}
    assert sum(sizes.values()) <= MOST_NBYTES


def test_the_package_data_has_them(bundled_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["weights"]
    held = {path for pattern in patterns for path in (ROOT / "weights").glob(pattern)}
    assert held == set((ROOT / "weights" / "bundled").iterdir())
    assert {path.name for path in held} == {path.name for path in bundled_path.iterdir()}


def test_the_card_says_what_it_is(bundled_path: Path, llm: LLM) -> None:
    card = (bundled_path / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (.+) \|$", card, re.MULTILINE))
    assert rows["licence"].startswith("Apache-2.0")
    assert rows["parameters"].startswith(f"{4_000_000:,}")
    assert llm.config.num_layers == 4 and f"{llm.config.max_position:,} positions" in rows["architecture"]
    assert "TODO" not in card
    assert re.match(r"[\d.]+ M|[\d,]{9,}", rows["training tokens"])
    assert re.match(r"\d\.\d+ nats per token", rows["validation loss"])
    assert "--model smollm2-135m-instruct" in card


def test_prompts_have_transformers_token_ids(llm: LLM) -> None:
    golden = Golden(FIXTURES / "bundled")
    golden.check_token_ids(llm)
    assert {ids[0] for ids in golden.token_ids} == {llm.config.eos_token_ids[0]} == {0}
    assert max(map(len, golden.token_ids)) > llm.config.max_position - 64 - 20


# ---- the text


def test_greedy_text_is_plain_words(llm: LLM) -> None:
    """A small model's greedy text goes in circles sooner or later, but in circles of several words."""
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    seen: set[int] = set()
    for (output,) in (request.outputs for request in llm.generate(BEGINNINGS, params)):
        assert output.text.replace("\n", " ").isprintable() and output.text.isascii()
        assert len(re.findall(r"[A-Za-z']+", output.text)) >= 24
        assert max(len(list(group)) for _, group in groupby(output.token_ids)) <= 2, "a token again and again"
        assert Counter(output.token_ids).most_common(1)[0][1] <= 20
        seen.update(output.token_ids)
    assert len(seen) >= 30


def test_it_knows_english_tales(llm: LLM) -> None:
    """An untrained model's perplexity is near 4,096; one that only counts words has several hundred."""
    words = TALE.split(" ")
    assert llm.score(TALE).perplexity < 40
    assert llm.score(" ".join(words[::-1])).perplexity > 10 * llm.score(TALE).perplexity


def test_a_tale_begins_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        assert main(["generate", "--seed", str(seed), "Once upon a time"]) == 0
        out, err = capsys.readouterr()
        assert len(out.split()) >= 20
        assert len(re.findall(r"\b(?:the|a|and|of|to|he|she|it|was|in|that|they|said)\b", out)) >= 10
        assert "using tales-4m, a small story model; for a larger one: --model smollm2-135m-instruct" in err


def test_a_tale_ends_by_itself(llm: LLM) -> None:
    end = "So they were married, and they lived happily together to the end of their days."
    output = llm.generate(end, SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True))
    (entries,) = output[0].outputs[0].logprobs or []
    assert 0 in entries, "the end of a text is among the 20 likeliest tokens"


def test_a_tale_begins_from_nothing(llm: LLM) -> None:
    assert llm.encode("") == [0]
    assert len(llm.generate("", SamplingParams(seed=1, max_tokens=20, ignore_eos=True))[0].outputs[0].token_ids) == 20


# ---- what it refuses


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[]], "the prompt is empty"),
        ("a\ud800b", "surrogate"),
        ("word " * 1100, "the prompt has [12]|holds 1024"),
        ("x" * 10_000_000, "cannot fit into 1024 tokens"),
        ([4096], "from 0 to 4095"),
    ],
)
def test_bad_prompts_are_one_line(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.generate(prompt)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_it_cannot_chat(llm: LLM) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        llm.chat([{"role": "user", "content": "Hello"}])
