"""bench_peers.py without any of the programs: how it asks them, takes turns, does without them, and reports."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tinyllm.models.registry import model_config
from weights import open_checkpoint

ROOT = Path(__file__).parents[2]

Load = Callable[[str], ModuleType]

FAKE = """
import os, sys, time
print("noise of an import")

class Peer:
    versions = {"fake": "1.0"}

    def prefill(self, token_ids):
        print("a line on stdout")
        os.write(1, b'{"id": 1, "value": "not the answer"}\\n')
        sys.stderr.write("a line on stderr\\n")
        return len(token_ids) / 4

    def decode(self, prompts, steps):
        if steps == 13:
            raise ValueError("bad\\nluck")
        return float(steps * len(prompts))

    def best_tokens(self, token_ids):
        if token_ids == [0]:
            time.sleep(60)
        if token_ids == [1]:
            print("cannot go on", flush=True)
            os._exit(3)
        if token_ids == [2]:
            os.kill(os.getpid(), 11)
        return [token + 1 for token in token_ids]

def load(model, threads, room, flavour="plain"):
    if flavour == "missing":
        import no_such_program
    return Peer()

def first_token(model, threads, text, flavour="plain"):
    print(text)
    return text.upper()

def prepare(source, target):
    with open(source) as a, open(target, "w") as b:
        b.write(a.read() * 2)
"""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports a script as a script does: its folder stands first on the path."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that a worker can run."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "fake_peer.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return "fake_peer"


@pytest.fixture
def start(load: Load, fake: str) -> Callable[..., Any]:
    def start(*arguments: str, timeout: float = 30) -> Any:
        return load("peers.process").PeerProcess(sys.executable, [fake, *arguments], timeout=timeout)

    return start


ROOM = {"tokens": 64, "sequences": 2}


def load_fake(process: Any, **options: str) -> Any:
    return process.ask("load", model="m", threads=1, room=ROOM, **options)


# ---- one process


def test_answers_are_told_from_what_a_program_prints(start: Callable[..., Any]) -> None:
    with start() as process:
        assert load_fake(process) == {"fake": "1.0"}
        assert process.ask("prefill", token_ids=[5, 6]) == 0.5
        assert process.ask("decode", prompts=[[1], [2]], steps=3) == 6
        assert process.ask("best_tokens", token_ids=[7, 8]) == [8, 9]
        assert process.ask("peak_nbytes") > 1e6


def test_a_failure_is_one_line_and_the_peer_goes_on(load: Load, start: Callable[..., Any]) -> None:
    p = load("peers.process")
    with start() as process:
        load_fake(process)
        with pytest.raises(p.PeerFailedError, match=r"^ValueError: bad luck$") as failure:
            process.ask("decode", prompts=[[1]], steps=13)
        assert not isinstance(failure.value, p.PeerDiedError)
        assert process.ask("decode", prompts=[[1]], steps=4) == 4


def test_an_absent_program_is_named(load: Load, start: Callable[..., Any]) -> None:
    absent = load("peers.interface").UnavailableError
    with start() as process, pytest.raises(absent, match="No module named 'no_such_program'"):
        load_fake(process, flavour="missing")
    with pytest.raises(absent, match="cannot be run: No such file"):
        load("peers.process").PeerProcess("no/such/python", ["x"], timeout=1)


@pytest.mark.parametrize(
    ("tokens", "told"), [([1], "ended with 3: cannot go on"), ([2], "ended with SIGSEGV"), ([0], "no answer in 2 s")]
)
def test_a_death_says_how(tokens: list[int], told: str, load: Load, start: Callable[..., Any]) -> None:
    died = load("peers.process").PeerDiedError
    with start(timeout=2 if tokens == [0] else 30) as process:
        load_fake(process)
        with pytest.raises(died, match=told):
            process.ask("best_tokens", token_ids=tokens)
        with pytest.raises(died):
            process.ask("prefill", token_ids=[1])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads a process's state from /proc")
def test_a_process_is_stopped_while_it_is_not_asked(load: Load, start: Callable[..., Any]) -> None:
    def state(process: Any) -> str:
        os.waitid(os.P_PID, process._process.pid, os.WSTOPPED | os.WNOWAIT)
        return Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    with start() as process:
        load_fake(process)
        assert state(process) == "T"
        with pytest.raises(load("peers.process").PeerFailedError):
            process.ask("decode", prompts=[[1]], steps=13)
        assert state(process) == "T"
    assert process._process.returncode == -signal.SIGKILL


def test_the_first_token_of_a_new_process(start: Callable[..., Any]) -> None:
    with start("first_token", json.dumps({"model": "m", "threads": 1, "text": "hello"})) as process:
        assert process.answer(0) == "HELLO"


def test_lines_that_are_no_replies(load: Load) -> None:
    reply = load("peers.process")._reply
    for line in (b"", b"noise", b"[1]", b"12", b'{"id": 1}', b'{"value": 1}', b"\xff\xfe"):
        assert reply(line) is None
    assert reply(b'{"id": 1, "failed": "x"}') == {"id": 1, "failed": "x"}


# ---- side by side


def test_peers_take_turns_and_one_that_fails_loses_its_figures(load: Load) -> None:
    contest, failed = load("peers.contest"), load("peers.process").PeerFailedError
    a, b, c = (SimpleNamespace(name=name) for name in "abc")
    turns: list[tuple[str, int]] = []
    lost: list[tuple[str, str]] = []

    def measure(peer: Any, repeat: int) -> float:
        turns.append((peer.name, repeat))
        if (peer.name, repeat) == ("b", 1):
            raise failed("tired")
        return float(repeat)

    figures = contest.alternate([a, b, c], 3, measure, lambda peer, error: lost.append((peer.name, str(error))))
    assert figures == {"a": [0, 1, 2], "c": [0, 1, 2]}
    assert lost == [("b", "tired")]
    assert turns == [
        *((name, -1) for name in "abc"), *((name, 0) for name in "abc"), *((name, 1) for name in "abc"),
        ("a", 2), ("c", 2),
    ]  # fmt: skip
    turns.clear()
    assert contest.alternate([a], 1, measure, print, warm=False) == {"a": [0]}


def fake_entry(load: Load, fake: str, name: str, form: str = "gguf", **options: str) -> Any:
    return load("peers.registry").Entry(
        name=name, program=name, module=fake, arithmetic="none", form=form, get="write it", options=options
    )


def test_absent_peers_are_skipped(load: Load, fake: str, tmp_path: Path) -> None:
    contest, interface = load("peers.contest"), load("peers.interface")
    (tmp_path / "model.gguf").write_text("ab")
    forms = load("peers.forms").Forms(tmp_path / "model.gguf", tmp_path / "forms")
    pythons = dict.fromkeys(("here", "made", "missing"), sys.executable) | {"nowhere": "no/such/python"}
    machine = contest.Machine(pythons, forms, threads=1, timeout=30)
    entries = [
        fake_entry(load, fake, "here"),
        fake_entry(load, fake, "missing", flavour="missing"),
        fake_entry(load, fake, "nowhere"),
        fake_entry(load, fake, "made", form="four of two"),
    ]
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        here, made = contest.start_all(
            entries, machine, interface.Room(64, 2), lambda entry, why: skipped.update({entry.name: why}), stack
        )
        assert skipped.keys() == {"missing", "nowhere"}
        assert "no_such_program" in skipped["missing"]
        assert here.versions == {"fake": "1.0"}
        assert here.model == str(tmp_path / "model.gguf")
        assert Path(made.model).read_text() == "abababab"
        assert sorted(path.name for path in (tmp_path / "forms").iterdir()) == ["four", "two"]
        rows = load("peers.rows")
        assert rows.best_tokens(here, range(5, 1030)) == list(range(6, 1031))
        assert rows.agreement([5, 6, 7, 8], [6, 7, 8, 0]).measure(here, 0) == 75
        by_name = {row.name: row for row in rows.timed_rows(machine, lambda count, repeat: [5] * count)}
        assert by_name["prefill 128"].measure(here, 0) == 4
        assert by_name["decode, context 1024"].measure(here, 0) == 1
        assert by_name["16 sequences, total"].measure(here, 0) == 1
        assert 0 < by_name["process start to first token"].measure(here, 0) < 30
        assert 1 < by_name["peak memory, 512 + 48 tokens"].measure(here, 0) < 1000
    assert here.process._process.returncode == made.process._process.returncode == -signal.SIGKILL


def test_a_form_appears_whole_or_not_at_all(load: Load, tmp_path: Path) -> None:
    forms = load("peers.forms").Forms(tmp_path / "model.gguf", tmp_path / "forms")

    def fail(_: Path, target: Path) -> None:
        target.write_text("half")
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        forms.path("whole", fail)
    assert list((tmp_path / "forms").iterdir()) == []
    made = forms.path("whole", lambda _, target: target.mkdir())
    assert made.is_dir()
    assert forms.path("whole", fail) == made


def test_the_huggingface_folder_has_the_weights_of_the_gguf_file(load: Load, tmp_path: Path) -> None:
    huggingface = load("peers.huggingface")
    models = ROOT / "tests" / "fixtures" / "models"
    with open_checkpoint(models / "mistral.gguf") as checkpoint:
        config = model_config(checkpoint)
        huggingface.write_safetensors(tmp_path / "model.safetensors", huggingface._tensors(checkpoint, config))
    (tmp_path / "config.json").write_text(json.dumps(huggingface._config(config)))
    with open_checkpoint(tmp_path) as written, open_checkpoint(models / "mistral") as original:
        assert model_config(written).num_layers == config.num_layers
        assert written.tensors.keys() <= original.tensors.keys()
        for name, tensor in written.tensors.items():
            assert np.array_equal(tensor.dequantize(), original.tensors[name].dequantize()), name


# ---- results


def results(load: Load) -> list[Any]:
    make = load("peers.report").Result
    return [
        make("prefill", "tokens/s", True, {"tinyllm": [90, 100, 300], "llama.cpp": [50], "openvino": [250, 150]}),
        make("start", "s", False, {"tinyllm": [0.5], "tinyllm-int8": [0.25], "llama.cpp": [1.0], "openvino": []}),
        make("best token", "%", True, {"tinyllm": [100]}),
    ]


def test_medians_and_ratios(load: Load) -> None:
    prefill, start, best = results(load)
    assert prefill.medians == {"tinyllm": 100, "llama.cpp": 50, "openvino": 200}
    assert prefill.best_other == "openvino"
    assert prefill.ratios == {"exact / llama.cpp": 2, "exact / best": 0.5, "int8 / best": None}
    assert start.best_other == "llama.cpp"
    assert start.ratios == {"exact / llama.cpp": 2, "exact / best": 2, "int8 / best": 4}
    assert best.ratios == {"exact / llama.cpp": None, "exact / best": None, "int8 / best": None}
    json.dumps([one.facts() for one in results(load)], allow_nan=False)


def test_table_and_page(load: Load) -> None:
    report, registry = load("peers.report"), load("peers.registry")
    lines = report.table(results(load), ["tinyllm", "tinyllm-int8", "openvino"])
    assert lines[1] == ["prefill, tokens/s", "100", "-", "200", "2.00", "0.50", "-", "openvino"]
    assert lines[2] == ["start, s", "0.50", "0.25", "-", "2.00", "2.00", "4.00", "llama.cpp"]
    assert lines[3] == ["best token", "100.0%", "-", "-", "-", "-", "-", "-"]
    assert len({len(line) for line in report.plain(lines).splitlines()}) == 1
    facts = {
        "machine": {"threads": 2, "cores": 2, "cpu": "a CPU"}, "model": {"name": "m"}, "repeats": 3, "command": "x",
    }  # fmt: skip
    page = report.document(results(load), registry.PEERS, {"tinyllm": {"tinyllm": "1"}}, {"openvino": "absent"}, facts)
    assert "| prefill, tokens/s | 100 | 2.00 | 0.50 | - | openvino |" in page
    assert "| tinyllm | tinyllm 1 |" in page
    assert "- openvino: absent" in page


# ---- the command line


def test_help_says_what_is_measured(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        load("bench_peers").main()
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "python scripts/bench_peers.py" in text
    assert "docs/peers" in text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--repeats", "0"], "--repeats"),
        (["--peers", "vllm"], "vllm"),
        (["--python", "transformers"], "PROGRAM=PATH"),
        (["--python", "vllm=python"], "PROGRAM=PATH"),
        (["--text", "no/such/file"], "no/such/file"),
        (["--model", "tales-4m"], "GGUF"),
    ],
)
def test_mistakes_are_named_before_anything_is_started(
    options: list[str], named: str, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *options])
    with pytest.raises(load("measurement").MistakeError) as mistake:
        load("bench_peers").main()
    assert named in str(mistake.value)
    assert "\n" not in str(mistake.value)
