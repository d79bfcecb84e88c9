"""What SmolLM2-135M-Instruct alone can do; test_real_models.py has what holds for any model. It is downloaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FIXTURES
from tests.e2e.golden import Golden
from tests.e2e.test_real_models import load
from tinyllm import LLM, InvalidRequestError, SamplingParams

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    return load(smollm2_path)


def test_prompts_have_llama_cpps_token_ids(llm: LLM) -> None:
    Golden(FIXTURES / "smollm2").check_token_ids(llm)


def test_chat_uses_the_models_template_and_ends_by_itself(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=60))
    assert "Paris" in output.outputs[0].text
    assert "<|im_" not in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    text = "".join(chunk.text for chunk in llm.stream_chat(messages, SamplingParams(temperature=0, max_tokens=60)))
    assert text == output.outputs[0].text


def test_score_likes_english_better_than_noise(llm: LLM) -> None:
    english = llm.score("The sun rises in the east and sets in the west.")
    noise = llm.score("west the in rises and The. sets east sun the in")
    assert english.perplexity < 20 < 200 < noise.perplexity
    assert english.token_texts is not None
    assert "".join(english.token_texts) == "The sun rises in the east and sets in the west."


def test_embeddings_put_like_with_like(llm: LLM) -> None:
    cats, kittens, budget = llm.embed(
        ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Parliament passed the budget."]
    )
    assert cats @ kittens > cats @ budget


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("a\ud800b", "surrogate"),
        ("word " * 9000, "the prompt has 90|holds 8192"),
        ("x" * 10_000_000, "cannot fit into 8192 tokens"),
        ([49152], "from 0 to 49151"),
    ],
)
def test_bad_prompts_are_one_line(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.generate(prompt)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
