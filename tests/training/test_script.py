"""train_bundled.py from a corpus to a model: stopped and resumed, killed, and what it says of mistakes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from tests.training import runs
from tinyllm.llm import LLM
from training import checkpoint
from training.backend import TrainingBackend
from training.config import TrainingConfig
from training.data import validation_windows
from training.log import read
from training.trainer import StepResult, Trainer

COMPARED = ("step", "tokens", "lr", "validation", "validation_average")  # of the log; others are times, or of steps


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus, the configuration and a work folder that holds the tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    runs.write_corpus(folder / "corpus")
    runs.write_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        arguments = ("--config", folder / "config.json", "--work", folder / "work", "--corpus", folder / "corpus")
        runs.run_script(patch, "prepare", *arguments)
    return folder


@dataclass
class Run:
    """A work folder of its own, on which the script runs in this process."""

    folder: Path
    patch: pytest.MonkeyPatch

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def __call__(self, command: str, *arguments: str | Path) -> None:
        runs.run_script(self.patch, command, "--config", self.folder / "config.json", "--work", self.work, *arguments)

    def train(self, *arguments: str) -> dict[str, bytes]:
        self("train", "--validate-every", "7", "--validation-windows", "3", *arguments)
        return self.checkpoint()

    def checkpoint(self) -> dict[str, bytes]:
        with np.load(self.work / "checkpoint.npz", allow_pickle=False) as content:
            return {name: array.tobytes() for name, array in content.items()}

    def step(self) -> int:
        return int(json.loads(self.checkpoint()["header"])["step"])

    def log(self) -> list[dict[str, float]]:
        return [{k: v for k, v in entry.items() if k in COMPARED} for entry in read(self.work / "log.jsonl")]


@pytest.fixture
def make(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Run]:
    def make(name: str) -> Run:
        shutil.copytree(prepared, tmp_path / name)
        return Run(tmp_path / name, monkeypatch)

    return make


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "whole"
    shutil.copytree(prepared, folder)
    with pytest.MonkeyPatch.context() as patch:
        run = Run(folder, patch)
        run.train("--threads", "2")
    return run


# ---- prepare


def test_prepare(prepared: Path) -> None:
    work = prepared / "work"
    assert sorted(path.name for path in work.iterdir()) == ["bytes.json", "tokenizer.json", "tokens"]
    tokens = {path.stem: np.load(path) for path in (work / "tokens").iterdir()}
    assert set(tokens) == {"one", "two", "valid"}
    assert [np.count_nonzero(tokens[name] == 0) for name in ("one", "two", "valid")] == [60, 40, 20]
    sizes = {path.stem: path.stat().st_size for path in (prepared / "corpus").iterdir()}
    assert json.loads((work / "bytes.json").read_text()) == sizes


def test_the_held_out_file_does_not_train_the_tokenizer(prepared: Path, make: Callable[[str], Run]) -> None:
    run = make("other")
    (run.folder / "corpus" / "valid.txt").write_text("zebra zebra zebra " * 500)
    run("prepare", "--corpus", run.folder / "corpus")
    tokenizers = (folder / "work" / "tokenizer.json" for folder in (prepared, run.folder))
    assert len({path.read_text() for path in tokenizers}) == 1


# ---- train


def test_a_run(whole: Run) -> None:
    assert whole.step() == 30
    expected = [7, 10, 14, 20, 21, 28, 30, 30]
    assert [entry["step"] for entry in whole.log()] == expected
    held_out = [entry["validation"] for entry in whole.log() if "validation" in entry]
    assert held_out[-1] < held_out[0] < np.log(270)
    assert "</svg>" in (whole.work / "loss.svg").read_text()


@pytest.mark.parametrize("stops", [[1], [13], [14], [15, 16], [7, 10, 21, 29]], ids=repr)
def test_a_run_that_was_stopped_and_resumed(stops: list[int], whole: Run, make: Callable[[str], Run]) -> None:
    run = make("stopped")
    for threads, stop in enumerate(stops, 1):
        run.train("--stop-at", str(stop), "--threads", str(threads))
        assert run.step() == stop
    assert run.train("--threads", "3") == whole.checkpoint()
    assert run.log() == whole.log()
    assert run.train() == whole.checkpoint()  # at its end there is nothing left to do
    assert run.log() == whole.log()


@pytest.mark.parametrize("saved", [6, 10, 14])
def test_a_run_that_was_killed(saved: int, whole: Run, make: Callable[[str], Run]) -> None:
    """The log is ahead of the checkpoint, and both have a part of what was to come beside them."""
    run = make("killed")
    run.train("--stop-at", str(saved))
    checkpoint = (run.work / "checkpoint.npz").read_bytes()
    run.train("--stop-at", "23")
    (run.work / "checkpoint.npz").write_bytes(checkpoint)
    (run.work / "checkpoint.npz.partial").write_bytes(checkpoint[:1000])
    with (run.work / "log.jsonl").open("a") as file:
        file.write('{"step": 24, "los')
    assert run.train() == whole.checkpoint()
    assert run.log() == whole.log()


def test_checkpoints_in_between_are_of_whole_steps(make: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """With --save-every the file is of the step just done, however the process ends after that."""
    run, save, steps = make("often"), checkpoint.save, []

    def saving(path: Path, state: checkpoint.State, digest: str) -> None:
        save(path, state, digest)
        assert run.step() == state.step
        steps.append(state.step)

    clock = itertools.count(0, 2)
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(checkpoint, "save", saving)
    run.train("--save-every", "3", "--stop-at", "9")
    assert steps == [2, 4, 6, 8, 9]


def test_a_signal_ends_the_run_after_its_step(make: Callable[[str], Run]) -> None:
    """A long run in a process of its own gets SIGTERM; it goes on to the bits of one that was not stopped."""
    run, other = make("signalled"), make("other")
    for each in (run, other):
        runs.write_config(
            each.folder, stages=[{"steps": 30_000, "sequences": 4, "length": 16, "sources": {"one": 1, "two": 1}}]
        )
    validate = ("--validate-every", "1000000")
    arguments: list[str | Path] = [
        "train",
        "--config",
        run.folder / "config.json",
        "--work",
        run.work,
        "--threads",
        "2",
        *validate,
    ]
    process = subprocess.Popen(
        [sys.executable, runs.SCRIPTS / "train_bundled.py", *arguments], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(runs.SCRIPTS.parent)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("step 10 "):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(60) == 0
    finally:
        process.kill()
    step = run.step()
    assert 10 <= step < 30_000
    assert rest.splitlines()[-1].startswith(f"stopped after step {step} of 30000; ")
    for each in (run, other):
        each.train("--stop-at", str(step + 5), *validate)
    assert run.checkpoint() == other.checkpoint()
    assert run.log() == other.log()


def test_a_second_signal_does_not_lose_the_steps_done(
    make: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("impatient")
    step, save = Trainer.step, checkpoint.save

    def stepping(self: Trainer, batch: NDArray[np.int32]) -> StepResult:
        result = step(self, batch)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    def saving(path: Path, state: checkpoint.State, digest: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(path, state, digest)

    monkeypatch.setattr(Trainer, "step", stepping)
    monkeypatch.setattr(checkpoint, "save", saving)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    try:
        run.train()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    except KeyboardInterrupt:
        pytest.fail("the handlers were gone")
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.step() == 3


# ---- export


def test_export(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The averaged weights, in a folder that generates."""
    run = Run(whole.folder, monkeypatch)
    run("export", "--out", tmp_path / "model", "--positions", "128")
    llm = LLM(tmp_path / "model", device="cpu", num_blocks=16)
    output = llm.generate("the old hen")
    assert output[0].outputs[0].token_ids
    held_out = np.load(run.work / "tokens" / "valid.npy")
    losses = [-llm.score(held_out[first : first + 31].tolist()).logprobs for first in range(0, len(held_out) - 30, 30)]
    assert np.concatenate(losses).mean() == pytest.approx(run.log()[-1]["validation_average"], abs=5e-3)
    config = TrainingConfig.load(run.folder / "config.json")
    state = checkpoint.load(run.work / "checkpoint.npz", config.digest(), Trainer.size(config))
    trainer, windows = Trainer(config, state, 1), validation_windows(held_out, 30)
    for parameters, name in ((trainer.parameters, "validation"), (trainer.average, "validation_average")):
        assert run.log()[-1][name] == round(trainer.evaluate(parameters, windows), 5)
    exported = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert (exported == trainer.average.embedding.astype(ml_dtypes.bfloat16)).all()
    assert (exported != trainer.parameters.embedding.astype(ml_dtypes.bfloat16)).any()


# ---- mistakes


def spoil(run: Run, file: str, content: bytes | None) -> None:
    path = run.folder / file
    path.unlink(missing_ok=True) if content is None else path.write_bytes(content)


@pytest.mark.parametrize(
    ("command", "file", "content", "message"),
    [
        ("prepare", "corpus/valid.txt", None, "has no valid.txt"),
        ("prepare", "corpus/one.txt", b"\xff", "one.txt is not UTF-8: byte 0"),
        ("prepare", "corpus/two.txt", b"", "two.txt holds no text"),
        ("prepare", "config.json", b"{}", "the configuration lacks 'seed'"),
        ("prepare", "config.json", None, "config.json: No such file or directory"),
        ("train", "work/tokens/valid.npy", None, "has no tokens; run `prepare` first"),
        ("train", "work/tokens/two.npy", None, "stage 1: there are no tokens of 'two'"),
        ("train", "work/tokens/one.npy", b"", "one.npy holds no tokens"),
        ("train", "work/checkpoint.npz", b"", "checkpoint.npz is no checkpoint"),
        ("train", "work/checkpoint.npz", b"PK", "checkpoint.npz is no checkpoint"),
        ("export", "work/tokenizer.json", None, "has no tokenizer; run `prepare` first"),
        ("export", "work/checkpoint.npz", None, "checkpoint.npz is no checkpoint"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_1(
    command: str,
    file: str,
    content: bytes | None,
    message: str,
    make: Callable[[str], Run],
) -> None:
    run = make("spoilt")
    spoil(run, file, content)
    options = {"prepare": ("--corpus", run.folder / "corpus"), "train": (), "export": ("--out", run.folder / "out")}
    check_mistake(run, message, command, *options[command])
    assert not (run.folder / "out").exists()


def check_mistake(run: Run, message: str, *arguments: str | Path) -> None:
    """sys.exit with a text prints it to stderr; the status is 1."""
    with pytest.raises(SystemExit) as stop:
        run(*map(str, arguments))
    assert isinstance(stop.value.code, str)
    assert stop.value.code.startswith("train_bundled: ")
    assert message in stop.value.code
    assert "\n" not in stop.value.code


def test_a_checkpoint_of_another_configuration(make: Callable[[str], Run]) -> None:
    run = make("other")
    run.train("--stop-at", "2")
    before = (run.work / "checkpoint.npz").read_bytes()
    runs.write_config(run.folder, lr=0.02)
    for command in (("train",), ("export", "--out", run.folder / "out", "--unfinished")):
        check_mistake(run, "belongs to another configuration", *command)
    assert (run.work / "checkpoint.npz").read_bytes() == before


def test_an_unfinished_run_is_exported_on_demand(make: Callable[[str], Run]) -> None:
    run = make("unfinished")
    run.train("--stop-at", "2")
    check_mistake(
        run, "is at step 2 of 30; --unfinished exports it all the same", "export", "--out", run.folder / "out"
    )
    assert not (run.folder / "out").exists()
    run("export", "--out", run.folder / "out", "--unfinished")
    assert (run.folder / "out" / "model.safetensors").exists()


def test_tokens_of_another_vocabulary(make: Callable[[str], Run]) -> None:
    run = make("other")
    runs.write_config(run.folder, model={**runs.CONTENT["model"], "vocab_size": 265})
    check_mistake(run, "and the vocabulary 265", "train")


def test_held_out_text_shorter_than_a_window(make: Callable[[str], Run]) -> None:
    run = make("short")
    np.save(run.work / "tokens" / "valid.npy", np.zeros(30, np.uint16))
    check_mistake(run, "'valid' has 30 tokens, fewer than a window", "train")


def test_a_gradient_that_is_not_finite(make: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends in one line; the checkpoint is of the steps before."""
    run = make("diverged")
    before = run.train("--stop-at", "2")
    monkeypatch.setattr(TrainingBackend, "sum_gradients", lambda *_: float("nan"))
    check_mistake(run, "step 2: the gradient's norm is nan", "train")
    assert run.checkpoint() == before


def test_a_full_disk(make: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device", "checkpoint.npz.partial")

    run = make("full")
    monkeypatch.setattr(checkpoint, "save", fails)
    check_mistake(run, "No space left on device", "train", "--stop-at", "1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "prepare | train | export"),
        (("train",), "--work"),
        (("prepare", "--work", "w"), "--corpus"),
        (("export", "--work", "w"), "--out"),
        (("train", "--work", "w", "--threads", "0"), "--threads: '0' is not a whole number above 0"),
        (("train", "--work", "w", "--stop-at", "1e3"), "--stop-at: '1e3' is not a whole number above 0"),
        (("train", "--work", "w", "--thread", "1"), "--thread"),
        (("learn",), "'learn'"),
    ],
)
def test_options(
    arguments: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        runs.run_script(monkeypatch, *arguments)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


# ---- as processes


def run_process(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Where PyTorch cannot be imported."""
    code = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = {[name, *arguments]!r}; "
    code += (
        f"sys.path.insert(0, {str(runs.SCRIPTS)!r}); runpy.run_path({str(runs.SCRIPTS / name)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(runs.SCRIPTS.parent)},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["train_bundled.py", "training_sweep.py", "compare_training.py"])
def test_help(name: str) -> None:
    done = run_process(name, "--help")
    assert done.returncode == 0
    assert f"python scripts/{name}" in done.stdout
    assert done.stderr == ""


def test_a_mistake_as_a_user_sees_it(tmp_path: Path) -> None:
    done = run_process("train_bundled.py", "train", "--work", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"train_bundled: {tmp_path} has no tokens; run `prepare` first\n"
    assert list(tmp_path.iterdir()) == []
