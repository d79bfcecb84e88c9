"""The official client against a real server, and its answers against those of LLM: the same bits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest

from tests.server.serving import Server, serving
from tinyllm import RequestOutput, SamplingParams, StructuredOutput

MODEL = "tales-4m"
MESSAGES = [{"role": "user", "content": "Tell me of the fox."}]
PROMPT = "Once upon a time there was a"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(max_batch_tokens=64, num_blocks=256, debug_checks=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as made:
        yield made


def expected(server: Server, prompt: Any, params: SamplingParams) -> RequestOutput:
    """What the LLM itself says, on an engine of its own."""
    return server.reference.generate([prompt], params)[0]


# ---- completions


def test_a_completion_has_the_text_usage_and_end_of_llm_generate(server: Server, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0)
    wanted = expected(server, PROMPT, SamplingParams(max_tokens=12, temperature=0))
    assert answer.choices[0].text == wanted.outputs[0].text != ""
    assert answer.choices[0].finish_reason == wanted.outputs[0].finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert answer.usage.completion_tokens == len(wanted.outputs[0].token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_completion_has_16_tokens_unless_it_says_otherwise(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def test_all_forms_of_a_prompt_are_taken(server: Server, client: openai.OpenAI) -> None:
    ids = server.llm.encode(PROMPT)
    texts = [
        [choice.text for choice in client.completions.create(model=MODEL, prompt=form, temperature=0).choices]
        for form in (PROMPT, ids, [PROMPT, "The king"], [ids, server.llm.encode("The king")])
    ]
    assert texts[0] == texts[1] == texts[2][:1]
    assert texts[2] == texts[3] and len(texts[2]) == 2


CASES: dict[str, dict[str, Any]] = {
    "n and seed": {"n": 3, "seed": 11, "temperature": 0.9},
    "negative seed": {"seed": -5},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.9, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {"17": 4.5, "586": -100.0}},  # 586 comes first without it
    "filters": {"top_p": 0.8, "top_k": 12, "min_p": 0.05},
    "stop": {"stop": [" the", "."], "max_tokens": 40},
    "stop kept": {"stop": " the", "include_stop_str_in_output": True, "max_tokens": 40},
    "stop ids": {"stop_token_ids": list(range(100, 400)), "min_tokens": 3},
    "best of": {"n": 2, "best_of": 4},
    "beams": {"n": 2, "beams": 3, "length_penalty": 0.5, "early_stopping": True},
    "streaming": {"window": 32, "sinks": 4, "max_tokens": 60, "ignore_eos": True},
    "salt and priority": {"cache_salt": "mine", "priority": 7},
    "special tokens": {"skip_special_tokens": False, "ignore_eos": True, "max_tokens": 50},
}
OPENAI_FIELDS = {"n", "seed", "temperature", "presence_penalty", "frequency_penalty", "logit_bias", "top_p"} | {
    *("stop", "max_tokens", "best_of")
}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_means_what_it_means_to_llm(server: Server, client: openai.OpenAI, name: str) -> None:
    fields = {"max_tokens": 14, **CASES[name]}
    own = {field: value for field, value in fields.items() if field not in OPENAI_FIELDS}
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, extra_body=own, **{f: v for f, v in fields.items() if f in OPENAI_FIELDS}
    )
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    wanted = expected(server, PROMPT, SamplingParams(**fields)).outputs
    assert [choice.text for choice in answer.choices] == [one.text for one in wanted]
    assert [choice.finish_reason for choice in answer.choices] == [one.finish_reason for one in wanted]
    assert [choice.index for choice in answer.choices] == list(range(len(wanted)))


def test_parameters_change_the_answer(server: Server) -> None:
    """Else the test above would pass on a server that ignores them."""
    plain = expected(server, PROMPT, SamplingParams(max_tokens=14)).outputs[0].text
    for name in ("penalties", "bias", "filters", "stop", "beams", "negative seed"):
        fields = {"max_tokens": 14, **CASES[name]}
        if "logit_bias" in fields:
            fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
        assert expected(server, PROMPT, SamplingParams(**fields)).outputs[0].text != plain, name


def test_log_probabilities_are_the_same_numbers(server: Server, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10, logprobs=3, seed=2)
    wanted = expected(server, PROMPT, SamplingParams(max_tokens=10, logprobs=3, seed=2)).outputs[0]
    found = answer.choices[0].logprobs
    assert found is not None and wanted.logprobs is not None
    chosen = [next(iter(entry.values())) for entry in wanted.logprobs]
    assert found.token_logprobs == [one.logprob for one in chosen]
    assert found.tokens == [one.decoded_token for one in chosen]
    assert "".join(found.tokens or []) == answer.choices[0].text
    assert found.text_offset == [len("".join((found.tokens or [])[:i])) for i in range(10)]
    assert all(entry is not None and len(entry) == 3 for entry in found.top_logprobs or [])
    for entry, shown in zip(wanted.logprobs, found.top_logprobs or [], strict=True):
        assert sorted(shown.values()) == sorted(one.logprob for one in entry.values() if one.rank <= 3)


def test_echo_gives_the_prompt_and_its_log_probabilities(server: Server, client: openai.OpenAI) -> None:
    scored = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    found = scored.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None
    assert scored.choices[0].text == PROMPT
    assert found.token_logprobs[0] is None
    assert np.array_equal(np.array(found.token_logprobs[1:], np.float32), server.reference.score(PROMPT).logprobs)
    longer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, echo=True, logprobs=0, temperature=0)
    alone = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, logprobs=0, temperature=0)
    assert longer.choices[0].text == PROMPT + alone.choices[0].text
    assert longer.choices[0].logprobs is not None and alone.choices[0].logprobs is not None
    both = [*found.token_logprobs, *(alone.choices[0].logprobs.token_logprobs or [])]
    assert longer.choices[0].logprobs.token_logprobs == both


def test_a_stream_of_several_prompts_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": MODEL, "prompt": [PROMPT, "The king"], "max_tokens": 20, "n": 2, "logprobs": 1}
    whole = client.completions.create(**request)
    texts, ends, numbers = [""] * 4, [""] * 4, [list[Any]() for _ in range(4)]
    usage = None
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            if choice.logprobs is not None:
                numbers[choice.index] += zip(
                    choice.logprobs.token_logprobs or [], choice.logprobs.text_offset or [], strict=True
                )
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    for choice, pairs in zip(whole.choices, numbers, strict=True):
        assert choice.logprobs is not None
        assert pairs == list(zip(choice.logprobs.token_logprobs or [], choice.logprobs.text_offset or [], strict=True))
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


# ---- chat


def test_a_chat_answers_what_llm_chat_answers(server: Server, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=15, seed=4)  # type: ignore[arg-type]
    wanted = server.reference.chat(MESSAGES, SamplingParams(max_tokens=15, seed=4)).outputs[0]
    assert answer.choices[0].message.content == wanted.text != ""
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == wanted.finish_reason


def test_a_streamed_chat_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 25, "n": 3, "seed": 1}
    request |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**request)
    texts, roles, ends = [""] * 3, [""] * 3, [""] * 3
    numbers: list[list[float]] = [[], [], []]
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] = choice.delta.role or roles[choice.index]
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            if choice.logprobs is not None:
                numbers[choice.index] += [one.logprob for one in choice.logprobs.content or []]
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 3
    assert ends == [choice.finish_reason for choice in whole.choices]
    for choice, logprobs in zip(whole.choices, numbers, strict=True):
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert logprobs == [one.logprob for one in choice.logprobs.content]
        assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)
        text = b"".join(bytes(one.bytes or []) for one in choice.logprobs.content)
        assert text.decode() == choice.message.content


def test_a_chat_without_a_limit_may_fill_the_context(server: Server, client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        stream=True,
        extra_body={"ignore_eos": True},  # type: ignore[arg-type]
    ) as stream:
        chunks = [chunk.choices[0].finish_reason for chunk in stream]
    assert chunks[-1] == "length"
    prompt = server.llm.encode_chat(MESSAGES)
    assert len(chunks) > (server.llm.memory.max_sequence_len - len(prompt)) / 2


def test_the_parts_of_a_content_are_one_text(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": " of the fox."}]
    answers = [
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": content}],
            max_tokens=5,
            temperature=0,  # type: ignore[arg-type,misc]
        )
        for content in (parts, MESSAGES[0]["content"])
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage is not None and answers[1].usage is not None
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


# ---- structured output

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMATS: dict[str, tuple[dict[str, Any], StructuredOutput]] = {
    "schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
            }
        },
        StructuredOutput.json_schema(SCHEMA),
    ),
    "object": ({"response_format": {"type": "json_object"}}, StructuredOutput.json_object()),
    "regex": ({"regex": "(the|a) (fox|king)( said)?"}, StructuredOutput.regex("(the|a) (fox|king)( said)?")),
    "grammar": ({"grammar": 'start: "yes" | "no"'}, StructuredOutput.grammar('start: "yes" | "no"')),
}


@pytest.mark.parametrize("name", FORMATS)
def test_structured_output_is_that_of_llm_generate(server: Server, client: openai.OpenAI, name: str) -> None:
    fields, structured_output = FORMATS[name]
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=60, n=2, extra_body=fields)
    wanted = expected(server, PROMPT, SamplingParams(max_tokens=60, n=2, structured_output=structured_output)).outputs
    assert [choice.text for choice in answer.choices] == [one.text for one in wanted]
    for choice in answer.choices:
        if name == "regex":
            assert re.fullmatch("(the|a) (fox|king)( said)?", choice.text)
        elif name == "grammar":
            assert choice.text in ("yes", "no")
        elif choice.finish_reason == "stop":
            found = json.loads(choice.text)
            assert isinstance(found, dict)
            assert name != "schema" or (sorted(found) == ["age", "name"] and 0 <= found["age"] <= 99)
    if name != "object":
        assert all(choice.finish_reason == "stop" for choice in answer.choices)


def test_a_chat_streams_json_of_a_schema(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        stream=True,
        max_tokens=80,
        **FORMATS["schema"][0],  # type: ignore[arg-type]
    )
    found = json.loads("".join(chunk.choices[0].delta.content or "" for chunk in stream))
    assert sorted(found) == ["age", "name"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regex": "("}, "regex"),
        ({"grammar": "start: other"}, "grammar"),
        ({"regex": "a", "grammar": 'start: "a"'}, "only one of regex and grammar may be given"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, "json_schema"),
        ({"regex": "(?=a)b"}, "regex"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused(
    client: openai.OpenAI, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, extra_body=fields)
    assert isinstance(caught.value.body, dict)
    assert message in caught.value.body["message"] and "\n" not in caught.value.body["message"]


# ---- the rest


def test_embeddings_are_those_of_llm_embed(server: Server, client: openai.OpenAI) -> None:
    texts = ["a cat", "a kitten", "the king of the north"]
    wanted = server.reference.embed(texts)
    for encoding in ("float", "base64"):
        answer = client.embeddings.create(model=MODEL, input=texts, encoding_format=encoding)  # type: ignore[arg-type]
        vectors = [row.embedding for row in answer.data]
        if encoding == "base64":
            import base64

            vectors = [np.frombuffer(base64.b64decode(row), "<f4").tolist() for row in vectors]  # type: ignore[arg-type]
        assert np.array_equal(np.array(vectors, np.float32), wanted)
        assert answer.usage.prompt_tokens == sum(len(server.llm.encode(text)) for text in texts)
    one = client.embeddings.create(model=MODEL, input="a cat")
    assert np.array_equal(np.array(one.data[0].embedding, np.float32), wanted[0])


def test_the_one_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1, "temperature must be a finite number at least 0"),
        ("n", 17, "n is 17; this server allows up to 16"),
        ("best_of", 17, "best_of is 17; this server allows up to 16"),
        ("beams", 1 << 40, "this server allows up to 16"),
        ("logprobs", 21, "this server reports from 0 to 20"),
        ("max_tokens", 0, "max_tokens must be an integer from 1"),
        ("stop", ["x"] * 300, "stop has 300 strings"),
        ("logit_bias", {"x": 1}, "a key of logit_bias must be a token id, not 'x'"),
        ("logit_bias", {"999999": 1}, "a token id in logit_bias"),
        ("prompt", [], "prompt is empty"),
        ("prompt", ["a"] * 65, "prompt has 65 prompts; this server takes 64"),
        ("prompt", [1, 2, 99999], "a prompt token id"),
        ("prompt", "fox " * 3000, "the prompt has"),
        ("no_such_field", 1, "unknown field 'no_such_field'"),
        ("seed", "one", "seed: "),
        ("stream_options", {"include_usage": True}, "stream_options is only for requests with stream"),
        ("window", 1 << 20, "sinks and window span"),
        ("model", "gpt-4", "there is no model 'gpt-4' here"),
        ("cache_salt", "x" * 5000, "cache_salt has 5000 characters"),
        ("response_format", {"type": "json_schema"}, "response_format of type json_schema needs json_schema.schema"),
    ],
)
def test_a_mistake_is_named_in_one_line(client: openai.OpenAI, field: str, value: Any, message: str) -> None:
    body = {"model": MODEL, "prompt": PROMPT, field: value}
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**body) if field in ("model", "prompt") else client.completions.create(
            model=MODEL, prompt=PROMPT, extra_body={field: value}
        )
    error = caught.value
    assert error.status_code in (400, 404)
    assert isinstance(error.body, dict)
    assert message in error.body["message"] and "\n" not in error.body["message"]


def test_a_prefix_that_is_cached_is_counted(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": list(range(40, 120)), "max_tokens": 1}
    found = [client.completions.create(**body).usage for _ in range(2)]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in found if usage and usage.prompt_tokens_details]
    assert cached == [0, 64]  # whole blocks of 16, and the last token always runs


# ---- the same bits


def test_requests_have_the_same_bits_alone_and_under_load(server: Server, client: openai.OpenAI) -> None:
    """Sixty requests at once in chunks and batches that nobody planned, each against LLM.generate alone."""
    cases: list[dict[str, Any]] = []
    for index in range(60):
        fields: dict[str, Any] = {"max_tokens": 3 + index % 17, "seed": index, "logprobs": 2}
        fields |= [{}, {"n": 2}, {"top_k": 20}, {"temperature": 0}, {"repetition_penalty": 1.3}][index % 5]
        cases.append(fields)
    prompts = [list(range(7 + i, 7 + i + 1 + (i * 13) % 150)) for i in range(60)]

    def over_http(index: int) -> list[list[float]]:
        own = {name: value for name, value in cases[index].items() if name not in OPENAI_FIELDS | {"logprobs"}}
        answer = client.completions.create(
            model=MODEL,
            prompt=prompts[index],
            extra_body=own,
            **{name: value for name, value in cases[index].items() if name not in own},
        )
        return [choice.logprobs.token_logprobs or [] for choice in answer.choices if choice.logprobs]  # type: ignore[misc]

    with ThreadPoolExecutor(60) as pool:
        found = list(pool.map(over_http, range(60)))
    for index, fields in enumerate(cases):
        wanted = expected(server, prompts[index], SamplingParams(**fields)).outputs
        numbers = [[next(iter(entry.values())).logprob for entry in one.logprobs or []] for one in wanted]
        assert found[index] == numbers, f"request {index}"
