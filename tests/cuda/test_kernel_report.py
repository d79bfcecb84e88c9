"""Occupancy and rooflines, and scripts/kernel_report.py on one family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

from cuda_kernels.compile import Compiler
from cuda_kernels.registry import all_kernels, shared_nbytes_of, work_of
from cuda_kernels.roofline import ARCHITECTURES, Ceilings, TileWork, occupancy

ROOT = Path(__file__).parents[2]


# ---- occupancy, worked out by hand from the programming guide's table


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared_nbytes", "blocks", "limit"),
    [
        ("sm_80", 256, 32, 0, 8, "registers"),  # 64 warps of 1,024 registers are all 65,536
        ("sm_80", 256, 33, 0, 6, "registers"),  # 1,280 registers a warp: 12 a part, 48 warps
        ("sm_90a", 128, 252, 0, 2, "registers"),  # 8,192 registers a warp: 2 a part
        ("sm_90a", 128, 32, 75 << 10, 3, "shared memory"),  # 3 x 76 KB of 228
        ("sm_80", 128, 32, 82 << 10, 1, "shared memory"),  # 83 KB twice are more than 164
        ("sm_86", 128, 16, 0, 12, "warps"),
        ("sm_86", 32, 16, 0, 16, "blocks"),
        ("sm_86", 128, 16, 100 << 10, 0, "shared memory"),
    ],
)
def test_occupancy(
    architecture: str, threads: int, registers: int, shared_nbytes: int, blocks: int, limit: str
) -> None:
    found = occupancy(ARCHITECTURES[architecture], threads=threads, registers=registers, shared_nbytes=shared_nbytes)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.fraction == blocks * threads / 32 / ARCHITECTURES[architecture].max_warps


def test_the_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    ceilings = Ceilings(bandwidth=100.0, tensor_flops=1000.0, f32_flops=50.0)
    assert ceilings.floor_seconds(TileWork(flop=2000, nbytes=100)) == 2.0
    assert ceilings.floor_seconds(TileWork(flop=200, nbytes=100)) == 1.0
    assert ceilings.floor_seconds(TileWork(flop=200, nbytes=100, tensor=False)) == 4.0
    assert ceilings.attainable_flops(TileWork(flop=200, nbytes=100)) == 200.0
    assert ceilings.attainable_flops(TileWork(flop=2000, nbytes=100)) == 1000.0


def test_what_families_say_of_their_kernels_fits_a_block() -> None:
    for kernel, family in all_kernels().items():
        assert 0 <= shared_nbytes_of(family, kernel) <= 99 << 10, kernel.name
        work = work_of(family, kernel)
        assert work is None or (work.flop > 0 and work.nbytes > 0), kernel.name
    told = {kernel.name for kernel, family in all_kernels().items() if work_of(family, kernel) is not None}
    assert {"attention_prefill_bf16_d128", "flash_attention_f32_d64", "linear_prefill_f16_r128_t64"} <= told


# ---- the script


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "kernel_report.py", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_the_report_of_one_family(compiler: Compiler, tmp_path: Path) -> None:
    json_file, page = tmp_path / "report.json", tmp_path / "report.html"
    options = ["--family", "sampling", "--architecture", "sm_90a", "--architecture", "sm_80"]
    done = _run(*options, "--json", str(json_file), "--html", str(page), "--cache", str(compiler.folder))
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(json_file.read_text())
    assert [(fact["kernel"], fact["architecture"]) for fact in facts] == [
        ("sample_tokens", "sm_90a"),
        ("sample_tokens", "sm_80"),
    ]
    main, other = facts
    assert main["threads"] == 1024 and main["spill_nbytes"] == 0 and 0 < main["occupancy"] <= 1
    assert sum(main["main_loop"].values()) == main["loop_instructions"] and "main_loop" not in other
    parser = HTMLParser()
    parser.feed(page.read_text())
    parser.close()
    text = page.read_text()
    assert text.count("<svg") == 3 and "sample_tokens" in text
    assert not any(outside in text for outside in ("<script", "<link", " src=", 'href="http'))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--family", "nothing"], "no family 'nothing'"),
        (["--architecture", "sm_1"], "sm_1"),
        (["--write-budgets", "--family", "sampling"], "--write-budgets needs all"),
    ],
)
def test_mistakes_are_one_line(options: list[str], named: str) -> None:
    done = _run(*options)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1


def test_instructions_are_counted_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    kinds = import_module("kernel_report_page").kinds_of({"HMMA": 2, "LDG.128": 3, "LDS.32": 1, "IMAD": 5, "FFMA": 7})
    assert {kind: count for kind, count in kinds.items() if count} == {
        "tensor core": 2,
        "float": 7,
        "shared memory": 1,
        "global memory": 3,
        "integer and control": 5,
    }
