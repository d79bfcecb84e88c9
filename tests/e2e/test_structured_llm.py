"""Structured output end to end with the bundled model: what comes out is what was asked for, in the same bits."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from tinyllm import LLM, InvalidRequestError, SamplingParams, StructuredOutput
from tinyllm.cli import main
from tinyllm.guidance import compiler as compiler_module
from tinyllm.outputs import RequestOutput
from tinyllm.replay import open_replay

PROMPT = "Once upon a time there was a king, and"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["king", "fox", "<|endoftext|>", "né\n中"]},
        "friends": {"type": "array", "items": {"$ref": "#/$defs/friend"}, "minItems": 1, "maxItems": 2},
        "rich": {"type": "boolean"},
    },
    "required": ["name", "age", "kind", "friends"],
    "additionalProperties": False,
    "$defs": {
        "friend": {
            "type": "object",
            "properties": {"name": {"type": "string", "pattern": "^[A-Z][a-z]{2,7}$"}},
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}
TREE = {
    "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
    "$ref": "#/$defs/tree",
}
PATTERN = r"(The|A) (old |young )?(king|fox) said: [A-Za-z ]{5,40}\.( [0-9]{2})?"
GRAMMAR = """
start: sentence (sentence sentence?)? "The end."
sentence: subject " " VERB (" and " VERB)? ". "
subject: "The fox" | "The king" | "A " ADJECTIVE " bird"
VERB: "ran" | "sang" | "slept"
ADJECTIVE: /[a-z]{3,8}/
"""
SENTENCES = r"((The fox|The king|A [a-z]{3,8} bird) (ran|sang|slept)( and (ran|sang|slept))?\. ){1,3}The end\."


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tales-4m", max_batch_tokens=64, num_blocks=96, debug_checks=True)


def is_person(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) <= set(SCHEMA["properties"])  # type: ignore[arg-type]
        and set(value) >= set(SCHEMA["required"])
        and len(value["name"]) <= 24
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and value["kind"] in SCHEMA["properties"]["kind"]["enum"]  # type: ignore[index]
        and 1 <= len(value["friends"]) <= 2
        and all(re.fullmatch("[A-Z][a-z]{2,7}", friend["name"]) for friend in value["friends"])
        and isinstance(value.get("rich", True), bool)
    )


def is_tree(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 2 and all(map(is_tree, value))


CASES = {
    "schema": (StructuredOutput.json_schema(SCHEMA), is_person),
    "tree": (StructuredOutput.json_schema(TREE), lambda text: is_tree(json.loads(text))),
    "regex": (StructuredOutput.regex(PATTERN), lambda text: re.fullmatch(PATTERN, text) is not None),
    "grammar": (StructuredOutput.grammar(GRAMMAR), lambda text: re.fullmatch(SENTENCES, text) is not None),
}
HOW: list[dict[str, Any]] = [
    {"seed": 1},
    {"temperature": 0},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "n": 3},
    {"beams": 3, "n": 3},
    {"ignore_eos": True, "best_of": 3, "n": 2},
]


def params_of(case: str, **params: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 300, "structured_output": CASES[case][0], **params})


@pytest.mark.parametrize("how", HOW, ids=lambda how: " ".join(how))
@pytest.mark.parametrize("case", CASES)
def test_texts_are_what_was_asked_for(llm: LLM, case: str, how: dict[str, Any]) -> None:
    (result,) = llm.generate([PROMPT], params_of(case, **how))
    assert result.error is None
    assert len(result.outputs) == how.get("n", 1)
    for output in result.outputs:
        if output.finish_reason == "stop":
            assert CASES[case][1](output.text), output.text
            assert output.stop_reason is None
    assert any(output.finish_reason == "stop" for output in result.outputs) or case == "tree"


def test_a_text_without_end_is_cut_and_any_object_is_json(llm: LLM) -> None:
    (result,) = llm.generate([PROMPT], SamplingParams(max_tokens=12, structured_output=StructuredOutput.json_object()))
    assert result.outputs[0].finish_reason in ("length", "stop")
    assert result.outputs[0].text.startswith("{")
    (result,) = llm.generate(
        [PROMPT], SamplingParams(max_tokens=9, structured_output=StructuredOutput.regex("[a-z ]+"))
    )
    assert re.fullmatch("[a-z ]+", result.outputs[0].text)


def test_stop_strings_still_end_a_text(llm: LLM) -> None:
    (result,) = llm.generate([PROMPT], params_of("regex", stop=["said"], seed=2))
    (output,) = result.outputs
    assert (output.finish_reason, output.stop_reason) == ("stop", "said")
    assert re.fullmatch(r"(The|A) (old |young )?(king|fox) ", output.text)


def test_a_stream_ends_with_its_text(llm: LLM) -> None:
    chunks = list(llm.stream(PROMPT, params_of("schema", seed=1)))
    assert is_person("".join(chunk.text for chunk in chunks))
    assert chunks[-1].finish_reason == "stop"


def texts_of(results: list[RequestOutput]) -> list[list[tuple[str, list[int], str | None]]]:
    return [[(o.text, o.token_ids, o.finish_reason) for o in result.outputs] for result in results]


def test_the_same_texts_alone_in_a_batch_in_chunks_and_without_room(llm: LLM) -> None:
    params = [params_of(case, **how) for case in CASES for how in HOW]
    params += [SamplingParams(max_tokens=20, seed=i) for i in range(4)]
    prompts = [PROMPT if i % 2 else f"{PROMPT} {i} more" for i in range(len(params))]
    alone = texts_of([llm.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)])
    assert texts_of(llm.generate(prompts, params)) == alone
    for options in ({"max_batch_tokens": 7}, {"num_blocks": 40, "max_batch_tokens": 33}, {"prefix_caching": False}):
        other = LLM("tales-4m", debug_checks=True, **{"num_blocks": 96, "max_batch_tokens": 64, **options})
        assert texts_of(other.generate(prompts, params)) == alone, options


def test_a_session_begins_a_new_text_with_each_call(llm: LLM) -> None:
    with llm.session(PROMPT) as session:
        for case in ("regex", "schema"):
            before = session.token_ids
            output = session.generate(params_of(case, seed=4))
            assert CASES[case][1](output.text)
            (plain,) = llm.generate([before], params_of(case, seed=4))
            assert (plain.outputs[0].text, plain.outputs[0].token_ids) == (output.text, output.token_ids)


def test_a_recorded_run_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    llm = LLM("tales-4m", max_batch_tokens=32, num_blocks=60, record=path)
    llm.generate([PROMPT] * 3, [params_of("regex", n=2), params_of("schema"), params_of("grammar", beams=2)])
    assert llm.recorder is not None
    llm.recorder.close()
    replay = open_replay(path)
    assert sum(1 for _ in replay) == replay.num_steps > 10
    text = path.read_text()
    assert '"structured_output":{"kind":"regex"' in text
    for broken, message in (('{"kind":"rEgex"', "kind of a structured output"), ('{"kind":"json_schema"', "JSON")):
        path.write_text(text.replace('{"kind":"regex"', broken, 1))
        with pytest.raises(Exception, match=f"line 2 is damaged: .*{message}"):
            open_replay(path)


def test_compiling_ahead_goes_on_in_other_threads_while_tokens_are_made(llm: LLM) -> None:
    expected = texts_of(llm.generate([PROMPT], params_of("schema", seed=9, n=3)))
    failures: list[BaseException] = []

    def compile_others(number: int) -> None:
        try:
            for i in range(3):
                llm.compile_structured_output(StructuredOutput.regex(f"{number} {i} [a-z]+"))
                with pytest.raises(InvalidRequestError):
                    llm.compile_structured_output(StructuredOutput.regex(f"({number}{i}"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=compile_others, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert texts_of(llm.generate([PROMPT], params_of("schema", seed=9, n=3))) == expected
    assert not failures


def test_what_is_compiled_ahead_is_not_compiled_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = StructuredOutput.regex("ahead [a-z]{3}")
    llm.compile_structured_output(wanted)
    monkeypatch.setattr(compiler_module, "_try", lambda structured_output: pytest.fail("compiled again"))
    (result,) = llm.generate([PROMPT], SamplingParams(structured_output=wanted, n=2))
    assert all(re.fullmatch("ahead [a-z]{3}", output.text) for output in result.outputs)


def test_a_text_that_cannot_be_compiled_is_one_line_and_the_model_serves_on(llm: LLM) -> None:
    bad = SamplingParams(structured_output=StructuredOutput.grammar("start: missing"))
    with pytest.raises(InvalidRequestError, match=r"prompt 1: the grammar cannot be compiled: .*missing"):
        llm.generate([PROMPT, PROMPT], [params_of("regex"), bad])
    assert not llm.engine.requests
    with pytest.raises(InvalidRequestError, match="min_tokens is 200"):
        for _ in llm.stream(PROMPT, params_of("regex", min_tokens=200)):
            pass
    assert llm.generate([PROMPT], params_of("regex"))[0].error is None


# ---- at a shell


def test_options_of_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema, grammar = tmp_path / "person.json", tmp_path / "tale.lark"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text(GRAMMAR)
    for options, check in (
        (["--json-schema", str(schema)], is_person),
        (["--regex", PATTERN], CASES["regex"][1]),
        (["--grammar", str(grammar)], CASES["grammar"][1]),
    ):
        assert main(["generate", "-q", "--max-tokens", "400", "--seed", "4", *options, PROMPT]) == 0
        assert check(capsys.readouterr().out.removesuffix("\n"))


def test_a_line_of_input_may_have_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"prompt": PROMPT, "structured_output": {"kind": "regex", "text": "[0-9]{4}"}},
        {"prompt": PROMPT, "structured_output": {"kind": "regex", "text": "("}},
        {"prompt": PROMPT, "structured_output": "regex"},
        {"prompt": PROMPT},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert main(["generate", "-q", "--json", "--model", "tales-4m", "--regex", "yes|no", "--input", str(path)]) == 2
    out, err = capsys.readouterr()
    digits, bad, wrong, default = map(json.loads, out.splitlines())
    assert re.fullmatch("[0-9]{4}", digits["text"])
    assert default["text"] in ("yes", "no")
    assert "the regex cannot be compiled: unclosed group" in bad["error"]
    assert "structured_output must be" in wrong["error"]
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", "no such file"], "cannot read no such file"),
        (["--json-schema", "{folder}/bad.json"], "--json-schema {folder}/bad.json: the json_schema is not JSON"),
        (["--grammar", "{folder}/empty"], "--grammar {folder}/empty: the grammar is empty"),
        (["--regex", ""], "--regex: the regex is empty"),
        (["--regex", "(a"], "the regex cannot be compiled: unclosed group"),
        (["--regex", "a", "--grammar", "x"], "not allowed with argument --regex"),
    ],
)
def test_mistakes_at_a_shell_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty").write_text("")
    argv = [option.replace("{folder}", str(tmp_path)) for option in options]
    try:
        status = main(["generate", "-q", *argv, PROMPT])
    except SystemExit as exit_:
        status = exit_.code  # type: ignore[assignment]
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message.replace("{folder}", str(tmp_path)) in err


def test_without_llguidance_the_command_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(compiler_module, "find_spec", lambda name: None if name == "llguidance" else real(name))
    assert main(["generate", "-q", "--regex", "a", PROMPT]) == 2
    assert "structured output needs llguidance: pip install 'tinyllm[structured]'" in capsys.readouterr().err
