"""scripts/gpu_check.py without a GPU: its checks on the emulator, kernels built ahead, and processes that go wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cuda_kernels.compile import Compiler
from cuda_kernels.errors import KernelCompileError
from cuda_kernels.gpu import driver_device_count
from cuda_kernels.kernel import Kernel
from tests.cuda.test_sass import _build_clean, _build_double

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, imported as a script is."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("gpu_check")


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_check.py", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# ---- on the emulator


@pytest.mark.parametrize(
    ("only", "count"),
    [
        ("check:norms", 2),
        ("kv_cache:write_kv, read_kv fp8", 1),
        pytest.param("sampling", 3, marks=pytest.mark.slow),
        pytest.param("paged_attention:", 21, marks=pytest.mark.slow),
        pytest.param("linear:", 22, marks=pytest.mark.slow),
        pytest.param("embedding:", 11, marks=pytest.mark.slow),
        pytest.param("flash_attention:", 7, marks=pytest.mark.slow),
        pytest.param("rope", 1, marks=pytest.mark.slow),
        pytest.param("activations", 1, marks=pytest.mark.slow),
    ],
)
def test_checks_pass_on_the_emulator(compiler: Compiler, tmp_path: Path, only: str, count: int) -> None:
    output = tmp_path / "result.json"
    done = _run("--emulated", "--only", only, "--cache", str(compiler.folder), "-o", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(output.read_text())
    assert facts["device"] == "emulated" and facts["failed_checks"] == []
    assert len(facts["checks"]) == count and all(check["passed"] for check in facts["checks"])
    assert f"{count} of {count} checks passed" in done.stdout


@pytest.mark.skipif(driver_device_count() > 0, reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("cupy")
    done = _run("-o", str(tmp_path / "result.json"))
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check.py: error: no NVIDIA GPU can be used") and done.stderr.count("\n") == 1


def test_a_name_that_nothing_has_is_a_mistake(tmp_path: Path) -> None:
    done = _run("--emulated", "--only", "nothing", "-o", str(tmp_path / "result.json"))
    assert (done.returncode, done.stderr) == (2, "gpu_check.py: error: nothing is called 'nothing' (see --list)\n")


def test_the_list_names_every_family_and_quick_leaves_timings_out() -> None:
    every, quick = (_run("--list", *args).stdout.splitlines() for args in ((), ("--quick",)))
    families = {"paged_attention", "linear", "embedding", "flash_attention", "sampling", "norms", "rope", "kv_cache"}
    assert families <= {name.split(":")[1] for name in every if ":" in name}
    assert set(quick) < set(every)
    assert {name for name in every if name.startswith("check:")} <= set(quick)


# ---- processes that go wrong

STUB = """
import json, os, sys, time
ids = sys.stdin.read().splitlines()
file = open(sys.argv[sys.argv.index("--worker") + 1], "a")
def say(**message):
    print(json.dumps(message), file=file, flush=True)
if ids[0] != "never":
    say(device={"device": "stub"})
for id_ in ids:
    if id_ == "never":
        sys.exit("no such device")
    say(start=id_)
    if id_ == "dies":
        os._exit(9)
    if id_ == "hangs":
        time.sleep(60)
    say(id=id_, seconds=0.0, failed="illegal address") if id_ == "faults" else say(id=id_, seconds=0.0, passed=True)
    if id_ == "faults":
        sys.exit(3)
"""


def _run_stub(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ids: list[str]) -> Any:
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setattr(script, "WORKER", stub)
    monkeypatch.setattr(script, "ITEM_SECONDS", 1.0)
    options = Namespace(time_limit=60.0, cache=tmp_path, quick=False, emulated=False, prebuilt=None)
    run = script.Run(options)
    script._run_all(run, ids, script.Console(quiet=True))
    return run


def test_an_item_that_faults_dies_or_hangs_is_reported_and_the_others_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = _run_stub(script, monkeypatch, tmp_path, ["a", "faults", "b", "dies", "c", "hangs", "d"])
    assert run.device == {"device": "stub"}
    assert {id_ for id_, result in run.results.items() if result.get("passed")} == {"a", "b", "c", "d"}
    assert run.results["faults"]["failed"] == "illegal address"
    assert run.results["dies"]["failed"] == "exit status 9"
    assert "nothing for 1 s" in run.results["hangs"]["failed"]


def test_a_process_that_never_starts_is_not_tried_again(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = _run_stub(script, monkeypatch, tmp_path, ["never", "a"])
    assert run.device == {} and run.trouble == "no such device"


# ---- parts


def test_nan_passes_no_check(script: ModuleType) -> None:
    suite = import_module("gpu_checks.suite")
    assert math.isnan(suite.larger(0.0, math.nan)) and math.isnan(suite.larger(math.nan, 1.0))
    assert not suite.Outcome(math.nan, 1.0).passed and not suite.Outcome(0.0, math.nan).passed
    assert math.isnan(suite.worst(np.array([1.0, np.nan]), np.zeros(2)))
    assert suite.worst(np.array([1.5, 0.0]), np.array([1.0, 0.0]), np.array([2.0, 0.0])) == 0.25
    assert suite.differing(np.float32([0.0, np.nan]), np.float32([-0.0, np.nan])).error == 1


def test_kernels_built_ahead_are_read_without_a_compiler(script: ModuleType, tmp_path: Path) -> None:
    prebuilt = import_module("gpu_checks.prebuilt")
    kernel, other = (Kernel(build.__name__, build, (), ("f32*", "i32"), 32) for build in (_build_clean, _build_double))
    said: list[str] = []
    folder, cache = tmp_path / "built", tmp_path / "cache"
    assert prebuilt.build([kernel], folder, "sm_90", cache, 1, said.append) == 0
    assert len(said) == 1
    assert prebuilt.build([kernel], folder, "sm_90", cache, 1, said.append) == 0
    assert len(said) == 1  # it is there
    compiled: list[str] = []

    class Refusing(prebuilt.PrebuiltCompiler):  # type: ignore[name-defined, misc]
        def ptx(self, kernel: Kernel) -> str:
            compiled.append(kernel.name)
            raise KernelCompileError("none here")

    compiler = Refusing(folder, None)
    assert compiler.cubin(kernel, "sm_90").startswith(b"\x7fELF")
    for absent, architecture in ((kernel, "sm_80"), (other, "sm_90")):
        with pytest.raises(KernelCompileError):
            compiler.cubin(absent, architecture)
    assert compiled == [kernel.name, other.name]


def test_building_notes_the_kernels_of_checks_and_timings(script: ModuleType) -> None:
    prebuilt, rows = import_module("gpu_checks.prebuilt"), import_module("gpu_checks.rows")
    suite = import_module("gpu_checks.suite")
    rt = prebuilt.RecordingRuntime()
    context = suite.Context(rt, np.random.default_rng(1), l2_nbytes=1)
    for timing in rows.timings():
        for launch in timing.prepare(context).launches:
            launch()
    names = {kernel.name for kernel in rt.kernels}
    assert {"silu_mul", "rope_64"} <= names and any(name.startswith("add_rms_norm") for name in names)
