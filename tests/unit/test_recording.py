"""Recordings as files: written line by line, read as hostile, drawn as a page that nothing can break out of."""

from __future__ import annotations

import base64
import errno
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from tests.id_matcher import IdMatcher
from tests.tiny import random_prompt, run_all, tiny_engine
from tinyllm.errors import InvalidRequestError, RecordingError
from tinyllm.recording import events, timeline
from tinyllm.recording.events import Abort, RequestAdded, Step
from tinyllm.recording.reader import Recording, sampling_params
from tinyllm.recording.recorder import Recorder
from tinyllm.recording.timeline import render_timeline
from tinyllm.sampling_params import SamplingParams
from tinyllm.structured_output import StructuredOutput

SCRIPT = Path(timeline.__file__).with_name("timeline_data.js")

HEADER: dict[str, Any] = {
    "format": "tinyllm-recording",
    "version": 1,
    "model": "tiny",
    "fingerprint": "abc",
    "vocab_size": 61,
    "engine": {"max_batch_tokens": 64, "block_size": 16, "num_blocks": 8, "kv_dtype": "f32"},
    "kv": {"num_layers": 2, "num_blocks": 8, "block_size": 16, "num_kv_heads": 2, "head_dim": 8, "dtype": "f32"},
}
REQUEST: dict[str, Any] = {"request": "a", "after": 0, "at": 0.5, "prompt": [1, 2, 3], "task": "generate"}
STEP: dict[str, Any] = {
    "step": 1,
    "at": 0.75,
    "ran": [["a", 0, 0, 3]],
    "admitted": [["a", 0, 0]],
    "rows": 1,
    "digest": "0123456789abcdef",
    "tokens": [["a", 0, 3, [7]]],
    "blocks": [[0, False, [["a", 0, 0]]]],
    "free": 7,
    "running": 1,
}
ABORT: dict[str, Any] = {"abort": "a", "after": 1, "at": 1}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path, *lines: Any) -> list[events.Event]:
    return list(Recording(write(path, *lines)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def small_run(path: Path, **options: Any) -> Recorder:
    engine = tiny_engine(**options)
    recorder = Recorder(path)
    recorder.attach(engine, "tiny")
    engine.add_request("a", random_prompt(20), SamplingParams(max_tokens=4))
    engine.add_request("b", random_prompt(20), SamplingParams(max_tokens=6, n=2))
    run_all(engine)
    return recorder


# ---- reading


def test_a_recording_is_read_as_it_was_written(path: Path) -> None:
    request, step, abort = read(path, HEADER, REQUEST, STEP, ABORT)
    assert request == RequestAdded(request_id="a", after=0, at=0.5, prompt=(1, 2, 3), task="generate", params={})
    assert isinstance(step, Step)
    assert step.ran == (events.Ran("a", 0, 0, 3),)
    assert step.tokens == (events.Tokens("a", 0, 3, (7,)),)
    assert step.blocks == (events.BlockChange(0, False, (events.Owner("a", 0, 0),)),)
    assert (step.at, step.free, step.waiting, step.rows) == (0.75, 7, 0, 1)
    assert abort == Abort(request_id="a", after=1, at=1)
    assert [json.loads(event.to_json()) for event in (request, step, abort)] == [REQUEST, STEP, ABORT]


def test_what_the_recorder_writes_is_read_back(path: Path) -> None:
    small_run(path).close()
    recording = Recording(path)
    lines = path.read_text().splitlines(keepends=True)
    assert recording.header.to_json() == lines[0]
    assert [event.to_json() for event in recording] == lines[1:]
    assert (recording.header.num_blocks, recording.header.block_size, recording.header.max_batch_tokens) == (64, 16, 64)
    assert recording.header.engine["device"] == "reference"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["\x00\xff"], "is not a recording: it is not JSON"),
        (["[1, 2]"], "is not a recording: it is not an object"),
        (['{"a": 1}'], "its first line does not say tinyllm-recording"),
        ([HEADER | {"version": 2}], "version 2 is unknown; this tinyllm reads version 1"),
        ([HEADER | {"version": True}], "version True is unknown"),
        ([HEADER | {"model": 3}], "model must be a string"),
        ([HEADER | {"more": 3}], "unknown field 'more'"),
        ([HEADER | {"vocab_size": 0}], "vocab_size must be an integer"),
        ([HEADER | {"kv": None}], "lacks the engine's options"),
        ([HEADER | {"kv": HEADER["kv"] | {"num_blocks": 9}}], "do not fit together"),
        ([HEADER | {"kv": HEADER["kv"] | {"dtype": ["f32"]}}], "dtype must be one of"),
        ([HEADER | {"kv": HEADER["kv"] | {"head_dim": 1.5}}], "head_dim must be an integer"),
        ([HEADER | {"engine": HEADER["engine"] | {"num_blocks": 1 << 40}}], "num_blocks must be an integer"),
        ([HEADER | {"engine": HEADER["engine"] | {"colour": 1}}], "unknown field 'colour'"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(RecordingError, match=re.escape(message)) as error:
        read(path, *lines)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "it is not JSON"),
        ("", "it is not JSON"),
        ('{"step": 1, "at": NaN}', "NaN is not a number"),
        ('{"step": 1, "at": -Infinity}', "-Infinity is not a number"),
        ('{"step": 1, "at": 1e999}', "at must be a number"),
        ('{"step": 1, "at": ' + "9" * 5000 + "}", ""),
        ('{"step":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("[]", "it is not an object"),
        ({"at": 1}, "neither a request, an abort nor a step"),
        ({**STEP, **ABORT}, "neither a request, an abort nor a step"),
        (STEP | {"at": 0.25}, "its time is before that of the line above"),
        (STEP | {"at": True}, "at must be a number"),
        (STEP | {"step": 2}, "step 2 follows step 0"),
        (STEP | {"step": 1.0}, "step must be an integer"),
        (STEP | {"colour": 1}, "unknown field 'colour'"),
        (STEP | {"ran": [["b", 0, 0, 3]]}, "there is no request 'b'"),
        (STEP | {"ran": [["a", 0, 0]]}, "ran must be a list of 4"),
        (STEP | {"ran": [["a", -1, 0, 3]]}, "index must be an integer"),
        (STEP | {"ran": [["a", 0, 0, 65]]}, "a count of tokens must be an integer from 1 to 64"),
        (STEP | {"ran": [["a", 0, 0, 0]]}, "a count of tokens must be an integer from 1"),
        (STEP | {"ran": [["a", 0, 0, 64], ["a", 1, 0, 1]]}, "more tokens ran than the budget of 64"),
        (STEP | {"ran": {}}, "ran must be a list"),
        (STEP | {"copies": [[0, 8]]}, "a block must be an integer from 0 to 7"),
        (STEP | {"evicted": [-1]}, "a block must be an integer from 0 to 7"),
        (STEP | {"evicted": [True]}, "a block must be an integer from 0 to 7"),
        (STEP | {"blocks": [[8, False, []]]}, "a block must be an integer from 0 to 7"),
        (STEP | {"blocks": [[0, 0, []]]}, "cached must be true or false"),
        (STEP | {"blocks": [[0, True, [["a", 0, -1]]]]}, "a place must be an integer"),
        (STEP | {"tokens": [["a", 0, 3, [61]]]}, "a token id must be an integer from 0 to 60"),
        (STEP | {"digest": "0123456789ABCDEF"}, "16 hexadecimal digits"),
        (STEP | {"digest": "01"}, "16 hexadecimal digits"),
        (STEP | {"free": 9}, "free must be an integer from 0 to 8"),
        (STEP | {"rows": -1}, "rows must be an integer"),
        (STEP | {"finished": [["a", 0, 3]]}, "a reason must be a string"),
        (ABORT | {"after": 0, "abort": "b"}, "there is no request 'b'"),
        (ABORT, "it says after step 1, but follows step 0"),
        (REQUEST | {"task": ["generate"]}, "task a list of 1 is unknown"),
        (REQUEST | {"prompt": []}, "the prompt is empty"),
        (REQUEST | {"prompt": [61]}, "a token id must be an integer from 0 to 60"),
        (REQUEST | {"params": {"temperature": -1}}, "temperature must be"),
        (REQUEST | {"params": {"logits_processors": []}}, "unknown field 'logits_processors'"),
        (REQUEST | {"params": {"logit_bias": [[1]]}}, "a pair of logit_bias must be a list of 2"),
        (REQUEST | {"params": {"logit_bias": [[[1], 2]]}}, "a token id must be an integer"),
        (REQUEST | {"params": {"logit_bias": {"1": 2}}}, "logit_bias must be a list"),
        (REQUEST | {"params": []}, "params must be a mapping"),
        (REQUEST | {"params": {"structured_output": "a"}}, "structured_output must be a StructuredOutput or"),
        (REQUEST | {"params": {"structured_output": {"kind": []}}}, "the kind of a structured output must be one of"),
        (REQUEST | {"params": {"structured_output": {"kind": "regex", "text": 3}}}, "the regex must be a string"),
        (REQUEST | {"params": {"structured_output": {"kind": "regex", "text": "\ud800"}}}, "not valid Unicode"),
        (
            REQUEST | {"params": {"structured_output": {"kind": "json_schema", "text": "[" * 99}}},
            "nested 99 deep; at most 64 is allowed",
        ),
        (REQUEST | {"session": 1}, "session must be true or false"),
        ({"interrupted": False, "after": 0, "at": 1}, "interrupted must be true"),
    ],
)
def test_a_damaged_line_is_named(path: Path, line: Any, message: str) -> None:
    with pytest.raises(RecordingError, match=r"line 3 is damaged: .*" + re.escape(message)) as error:
        read(path, HEADER, REQUEST, line)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_line_without_end_is_refused_before_it_is_read_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllm.recording.reader.MAX_LINE_NBYTES", 2000)
    assert len(read(path, HEADER, REQUEST)) == 1
    with pytest.raises(RecordingError, match="line 3 has more than 2000 bytes"):
        read(path, HEADER, REQUEST, REQUEST | {"prompt": [1] * 1000})
    with pytest.raises(RecordingError, match="is not a recording"):
        read(path, "x" * 3000)


@pytest.mark.parametrize("path", [".", "no/such/file", "null\0character"])
def test_a_file_that_cannot_be_opened_is_one_line(path: str) -> None:
    with pytest.raises(RecordingError, match="cannot read"):
        Recording(path)


def test_only_a_last_line_may_break_off(path: Path) -> None:
    """At every byte: what is read is a prefix of the events, and no error but for the header's line."""
    whole = read(path, HEADER, REQUEST, STEP, ABORT)
    data = path.read_bytes()
    header_end = data.index(b"\n") + 1
    for end in range(len(data)):
        path.write_bytes(data[:end])
        if end < header_end:
            with pytest.raises(RecordingError):
                Recording(path)
            continue
        recording = Recording(path)
        found = list(recording)
        assert found == whole[: len(found)]
        assert recording.torn == (data[end - 1 : end] != b"\n")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_to_a_line_is_read_or_refused_by_name(data: st.DataObject, tmp_path_factory: Any) -> None:
    """No value anywhere makes the reader or the page fail in another way."""
    lines = json.loads(json.dumps([HEADER, REQUEST, STEP, ABORT]))
    target = lines[data.draw(st.integers(0, 3))]
    for _ in range(data.draw(st.integers(1, 4))):
        if not isinstance(target, (dict, list)) or not target:
            break
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        key = data.draw(st.sampled_from(keys))
        if data.draw(st.booleans()):
            target[key] = data.draw(JSON)
            break
        target = target[key]
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    try:
        for event in read(path, *lines):
            if isinstance(event, RequestAdded):
                sampling_params(event)
        render_timeline(path)
    except RecordingError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


@settings(max_examples=60, deadline=None)
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "max_tokens": st.integers(1, 1 << 40),
            "temperature": st.floats(0, 1e300),
            "top_p": st.floats(0, 1, exclude_min=True),
            "seed": st.integers(-(1 << 63), (1 << 64) - 1),
            "stop": st.lists(st.text(min_size=1, max_size=4), max_size=3),
            "stop_token_ids": st.lists(st.integers(0, 60), max_size=3),
            "logit_bias": st.dictionaries(st.integers(0, 60), st.floats(-100, 100), max_size=3),
            "beams": st.integers(1, 4),
            "early_stopping": st.sampled_from([True, False, "never"]),
            "cache_salt": st.text(st.characters(exclude_categories=[]), max_size=5),
            "priority": st.integers(-5, 5),
            "window": st.integers(1, 99),
            "logprobs": st.integers(0, 5),
            "structured_output": st.builds(
                StructuredOutput, st.sampled_from(["regex", "grammar"]), st.text('ab\u2028"\\').map("a".__add__)
            )
            | st.just(StructuredOutput.json_object()),
        },
    )
)
def test_every_parameter_survives_the_file(values: dict[str, Any], tmp_path_factory: Any) -> None:
    try:
        params = SamplingParams(**values)
    except InvalidRequestError:
        return
    path = tmp_path_factory.getbasetemp() / "params.jsonl"
    engine = tiny_engine(max_model_len=64, make_matcher=lambda wanted: IdMatcher(range(61), 4))
    recorder = Recorder(path)
    recorder.attach(engine, "tiny")
    try:
        engine.add_request("a", [1, 2, 3], params)
    except InvalidRequestError:  # stop strings: this engine has no tokenizer
        return
    finally:
        recorder.close()
    (event,) = Recording(path)
    assert isinstance(event, RequestAdded)
    assert sampling_params(event) == params


# ---- writing


def test_each_line_is_in_the_file_when_it_happened(path: Path) -> None:
    engine = tiny_engine()
    recorder = Recorder(path)
    recorder.attach(engine, "tiny")
    engine.add_request("a", random_prompt(20), SamplingParams(max_tokens=4))
    for count in range(4):
        assert len(list(Recording(path))) == 1 + count
        engine.step()
    recorder.close()


def test_an_older_recording_is_written_over_and_nothing_else_is(path: Path) -> None:
    small_run(path).close()
    long = path.stat().st_size
    engine = tiny_engine()
    recorder = Recorder(path)
    assert path.stat().st_size == long, "nothing is lost before the new run begins"
    recorder.attach(engine, "tiny")
    recorder.close()
    assert list(Recording(path)) == []
    path.write_text("a novel\n")
    with pytest.raises(RecordingError, match="exists and is not a recording"):
        Recorder(path)
    assert path.read_text() == "a novel\n"


@pytest.mark.parametrize("name", ["no/such/folder/run.jsonl", ".", "null\0character"])
def test_a_path_that_cannot_be_written_is_named_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecordingError, match="cannot write the recording"):
        Recorder(str(tmp_path / name))


def test_a_disk_that_fills_up_ends_the_recording_but_not_the_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    engine = tiny_engine()
    recorder = Recorder(path, on_error=said.append)
    recorder.attach(engine, "tiny")
    engine.add_request("a", random_prompt(20), SamplingParams(max_tokens=8))
    write_line = Recorder._write_line
    count = 0

    def fails_at_the_third(self: Recorder, line: str) -> None:
        nonlocal count
        count += 1
        if count == 3:
            write_line(self, line[:10])  # a disk takes part of a line
            raise OSError(errno.ENOSPC, "No space left on device")
        write_line(self, line)

    monkeypatch.setattr(Recorder, "_write_line", fails_at_the_third)
    outputs = run_all(engine)
    alone = tiny_engine()
    alone.add_request("a", random_prompt(20), SamplingParams(max_tokens=8))
    assert outputs["a"].outputs[0].token_ids == run_all(alone)["a"].outputs[0].token_ids
    assert said == [f"the recording {path} is incomplete: No space left on device"] == [recorder.error]
    assert count == 3, "nothing is written after a failure: the file stays readable"
    recording = Recording(path)
    assert len(list(recording)) == 3
    recorder.close()


class SlowFile:
    """A file that takes a few bytes at a time, as a pipe or a nearly full disk may."""

    closed = False

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> int:
        self.data += data[:7]
        return len(data[:7])

    def close(self) -> None:
        self.closed = True


def test_a_line_that_is_taken_in_parts_is_written_whole(path: Path) -> None:
    engine = tiny_engine()
    recorder = Recorder(path)
    recorder.attach(engine, "tiny")
    recorder._file = slow = SlowFile()  # type: ignore[assignment]
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=3))
    run_all(engine)
    lines = slow.data.decode().splitlines()
    assert [next(iter(json.loads(line))) for line in lines] == ["request", "step", "step", "step"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_before_anything_runs() -> None:
    with pytest.raises(RecordingError, match="cannot write the recording /dev/full: No space left"):
        Recorder("/dev/full").attach(tiny_engine(), "tiny")


def test_without_a_listener_a_failure_is_a_warning(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    recorder = Recorder(path)
    recorder.attach(engine, "tiny")
    monkeypatch.setattr("tinyllm.recording.recorder.MAX_LINE_NBYTES", 100)
    with pytest.warns(RuntimeWarning, match="is incomplete: a line of"):
        engine.add_request("a", [1] * 100, SamplingParams())
    assert list(Recording(path)) == []


# ---- the page


class Page(html.parser.HTMLParser):
    """What a browser would find in the page: elements, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts.append(data)


HOSTILE = (
    "</script><script>alert(1)</script><!--<script>&lt;\u2028\u2029\u202e\ud800\x00'\"`${1}{{SCRIPT}}{{DATA}}\\u003c"
)


def test_nothing_that_a_recording_says_gets_out_of_the_data(path: Path) -> None:
    plain = Page(render_timeline(write(path, HEADER, REQUEST, STEP)).html)
    lines = [
        HEADER | {"model": HOSTILE, "fingerprint": HOSTILE},
        REQUEST | {"request": HOSTILE},
        json.loads(json.dumps(STEP).replace('"a"', json.dumps(HOSTILE))) | {"finished": [[HOSTILE, 0, HOSTILE]]},
    ]
    text = render_timeline(write(path, *lines)).html
    assert text.isascii()
    page = Page(text)
    assert page.elements == plain.elements
    assert len(page.scripts) == 2
    data = json.loads(page.scripts[0])
    assert data["model"] == data["fingerprint"] == data["requests"][0]["id"] == HOSTILE
    assert data["steps"][0]["f"][1] == HOSTILE
    assert not set("<>&") & set(page.scripts[0])


def test_the_page_asks_for_nothing_and_lets_nothing_else_run(path: Path) -> None:
    text = render_timeline(write(path, HEADER, REQUEST, STEP)).html
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(page.elements)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import|innerHTML|insertAdjacent|document\.write|eval\(|fetch\(", text)
    assert "default-src 'none'" in text
    assert "unsafe" not in text
    assert text.count("'sha256-") == 2


def test_a_part_of_the_steps_begins_with_the_blocks_as_they_were(path: Path) -> None:
    small_run(path).close()
    steps = [event for event in Recording(path) if isinstance(event, Step)]
    before: dict[int, events.BlockChange] = {change.block: change for step in steps[:2] for change in step.blocks}
    data = json.loads(Page(render_timeline(path, first=3, last=4).html).scripts[0])
    assert [step["n"] for step in data["steps"]] == [3, 4]
    names = [(data["requests"][request]["id"], index) for request, index in data["sequences"]]
    assert {
        block: (cached, [names[s] for s in owners]) for block, (cached, owners) in blocks_of(data["initial"]).items()
    } == {
        block: (change.cached, [(o.request_id, o.sequence) for o in change.owners])
        for block, change in before.items()
        if change.cached or change.owners
    }
    assert len(data["initial"]) > 0
    with pytest.raises(RecordingError, match=f"has only {len(steps)} steps"):
        render_timeline(path, first=len(steps) + 1)


def blocks_of(flat: list[int]) -> dict[int, tuple[bool, list[int]]]:
    """block -> (cached, sequences), from the page's flat form."""
    found = {}
    i = 0
    while i < len(flat):
        block, cached, count = flat[i : i + 3]
        found[block] = bool(cached), flat[i + 3 : i + 3 + 2 * count : 2]
        i += 3 + 2 * count
    return found


def test_a_recording_too_long_for_a_page_says_what_to_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run(path).close()
    monkeypatch.setattr(timeline, "MAX_STEPS", 3)
    with pytest.raises(RecordingError, match="draw a part of it"):
        render_timeline(path)
    assert render_timeline(path, first=2, last=4).num_steps == 3
    monkeypatch.setattr(timeline, "MAX_BLOCKS", 1)
    with pytest.raises(RecordingError, match="a page shows 1 at most"):
        render_timeline(path, last=3)


def test_a_recording_without_steps_is_a_page_too(path: Path) -> None:
    page = render_timeline(write(path, HEADER))
    assert (page.num_steps, page.num_requests, page.torn) == (0, 0, False)


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node, to run the page's script")


def run_script(tmp_path: Path, page: str, code: str) -> Any:
    """Evaluates code with the page's script as `page` and its data as `data`."""
    (tmp_path / "data.json").write_text(Page(page).scripts[0])
    program = (
        f"const page = require({json.dumps(str(SCRIPT))});\n"
        f"const raw = JSON.parse(require('fs').readFileSync({json.dumps(str(tmp_path / 'data.json'))}, 'utf8'));\n"
        f"const data = page.decode(raw);\n{code}"
    )
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_the_script_rebuilds_the_blocks_of_any_step_in_any_order(path: Path, tmp_path: Path) -> None:
    engine = tiny_engine(num_blocks=12, max_batch_tokens=24)
    recorder = Recorder(path)
    recorder.attach(engine, "tiny")
    for i in range(50):
        engine.add_request(f"r{i}", random_prompt(5 + i, i % 7), SamplingParams(max_tokens=20, n=1 + i % 3, seed=i))
    run_all(engine)
    recorder.close()
    steps = [event for event in Recording(path) if isinstance(event, Step)]
    assert len(steps) > 300, "more than two keyframes"
    expected: list[list[int]] = []
    state = [0] * 12
    for step in steps:
        for change in step.blocks:
            state[change.block] = 1000 * change.cached + len(change.owners)
        expected.append(state.copy())
    order = [0, 299, 298, 128, 127, 129, 5, 256, 255, *range(len(steps))]
    code = (
        "const history = new page.BlockHistory(data);\n"
        f"const seen = {order}.map((i) => history.after(i).map((s) => 1000 * s.cached + s.owners.length));\n"
        "process.stdout.write(JSON.stringify(seen));"
    )
    used = max(change.block for step in steps for change in step.blocks) + 1
    assert run_script(tmp_path, render_timeline(path).html, code) == [expected[i][:used] for i in order]


@needs_node
def test_the_script_says_what_happened_in_words(path: Path, tmp_path: Path) -> None:
    lines = [
        HEADER,
        REQUEST | {"request": "a\u202e\n"},
        STEP
        | {
            "ran": [["a\u202e\n", 0, 0, 3]],
            "admitted": [["a\u202e\n", 0, 2]],
            "tokens": [["a\u202e\n", 0, 3, [1]]],
            "blocks": [[0, True, [["a\u202e\n", 0, 0], ["a\u202e\n", 1, 0]]]],
            "copies": [[3, 4]],
            "evicted": [4],
            "forks": [["a\u202e\n", 1, 0]],
            "preempted": [["a\u202e\n", 0]],
            "finished": [["a\u202e\n", 0, "length"]],
        },
    ]
    code = (
        "const history = new page.BlockHistory(data);\n"
        "const words = page.story(data, data.steps[0]).map((pair) => pair[1]);\n"
        "words.push(page.blockStory(data, 0, history.after(0)[0]), String(page.seconds(data, 0)));\n"
        "process.stdout.write(JSON.stringify(words));"
    )
    name = "equest a\\u202e\\u000a"
    assert run_script(tmp_path, render_timeline(write(path, *lines)).html, code) == [
        f"R{name} arrived, with 3 prompt tokens.",
        f"R{name} was preempted: it lost its blocks, to be computed again.",
        f"R{name} began to run; its first 2 tokens were in memory already.",
        "Cached contents were given up, because blocks were needed: 4.",
        "Block 3 was copied to block 4: others still read it, and it was to be written.",
        f"R{name}: tokens 0 to 2 of 3 prefilled, and a first token made.",
        f"R{name} (sequence 1) forked from r{name}: same blocks, no copy.",
        f"R{name} reached its length limit.",
        f"Block 0 holds tokens 0 to 15 of r{name}, r{name} (sequence 1): shared by 2; "
        "it can be found by other prompts (cached).",
        "0.25",
    ]


def test_the_pages_policy_names_its_script_and_style(path: Path) -> None:
    """A browser runs the script only if the page's policy names its digest."""
    page = Page(render_timeline(write(path, HEADER)).html)
    assert SCRIPT.read_text() in page.scripts[1]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    policies = [value for name, value in page.attributes if value and "default-src" in value]
    assert len(policies) == 1
    assert f"script-src 'sha256-{digest}'" in policies[0]
