"""The command line: ordinary numba.cuda scripts, run as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda")

HEADER = "import math\nimport sys\nimport numpy as np\nfrom numba import cuda, float32, int32\n"


def run(folder: Path, text: str, *options: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(HEADER + text)
    command = [sys.executable, "-m", "cuda_kernels.emulator", *options, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


RACE = """
@cuda.jit
def reverse(x, y):
    tile = cuda.shared.array(128, float32)
    t = cuda.threadIdx.x
    tile[t] = x[t]
    y[t] = tile[127 - t]

x = np.arange(128, dtype=np.float32)
y = cuda.device_array_like(x)
for _ in range(3):
    reverse[1, 128](cuda.to_device(x), y)
print(y.copy_to_host()[0], sys.argv[1:])
"""


def test_a_race_is_reported_with_the_text_of_its_line(tmp_path: Path) -> None:
    done = run(tmp_path, RACE, arguments=("--max-problems", "7"))

    assert done.returncode == 1
    assert done.stdout == "127.0 ['--max-problems', '7']\n"
    assert "shared-race in reverse: read-after-write race in shared memory" in done.stderr
    assert "script.py:11: y[t] = tile[127 - t]" in done.stderr
    assert done.stderr.count("shared-race in") == 1  # once, not at every launch
    assert "reverse: 3 launches," in done.stderr and ", 1 problems" in done.stderr


def test_races_can_be_left_unchecked(tmp_path: Path) -> None:
    done = run(tmp_path, RACE, "--no-races", "--no-global-races")
    assert done.returncode == 0
    assert "race" not in done.stderr


def test_kernels_go_on_after_problems_and_only_some_are_printed(tmp_path: Path) -> None:
    text = """
@cuda.jit("void(float32[::1], float32[::1], int32)")
def shift(x, y, n):
    i = cuda.grid(1)
    if i < n:
        y[i] = x[i + 1]
    y[i + 1] = 0.0

x = np.ones(100, np.float32)
y = np.zeros(100, np.float32)
shift[1, 100](x, y, 100)
shift.forall(64)(x, y, 64)
print(y[:3])
"""
    done = run(tmp_path, text, "--max-problems", "1", "--no-global-races")
    assert done.returncode == 1
    assert done.stderr.count("out-of-bounds in shift") == 1
    assert "read of 4 bytes outside of global memory, at byte 400 of an array of 400 bytes" in done.stderr
    assert "script.py:10: y[i] = x[i + 1]" in done.stderr
    assert "... and more problems" in done.stderr
    assert "shift: 2 launches" in done.stderr


CLEAN = """
@cuda.jit(device=True)
def square(v):
    return v * v

@cuda.jit
def total(x, out, bias):
    tile = cuda.shared.array(0, float32)
    t = cuda.threadIdx.x
    tile[t] = square(x[cuda.grid(1)]) + bias[0] + bias[1]
    cuda.syncthreads()
    step = cuda.blockDim.x // 2
    while step > 0:
        if t < step:
            tile[t] += tile[t + step]
        cuda.syncthreads()
        step //= 2
    if t == 0:
        cuda.atomic.add(out, 0, tile[0])

assert cuda.is_available() and cuda.get_current_device().compute_capability == (9, 0)
stream, start, end = cuda.stream(), cuda.event(), cuda.event()
x = np.arange(256, dtype=np.float32) / 16
out = cuda.to_device(np.zeros(1, np.float32), stream=stream)
start.record(stream)
total[2, 128, stream, 4 * 128](x, out, (float32(0.25), float32(0.75)))
end.record(stream)
stream.synchronize()
cuda.synchronize()
assert cuda.event_elapsed_time(start, end) >= 0
host = np.empty(1, np.float32)
out.copy_to_host(host)
assert host[0] == (x * x).sum() + 256, host
twice = cuda.device_array((4, 6), np.int32, order="F")
assert twice.flags.f_contiguous

@cuda.jit
def fill(matrix, value):
    i, j = cuda.grid(2)
    if i < matrix.shape[0] and j < matrix.shape[1]:
        matrix[i, j] = value + i * 10 + j

fill[(1, 2), (4, 4)](twice, 5)
assert (twice.copy_to_host() == 5 + np.add.outer(10 * np.arange(4), np.arange(6))).all()
part = np.zeros((6, 8), np.int32)
fill[(2, 2), (4, 4)](part[::2, 1::3], 1)
assert (part[::2, 1::3] == 1 + np.add.outer(10 * np.arange(3), np.arange(3))).all()
fill[(2, 2), (4, 4)](cuda.Out(part), 2)
twice[0, :] = 0
print("done", twice.copy_to_host()[0].sum())
sys.exit(3)
"""


def test_a_clean_script_runs_to_its_own_exit_status(tmp_path: Path) -> None:
    done = run(tmp_path, CLEAN, "--target", "sm_90")
    assert (done.returncode, done.stdout) == (3, "done 0\n"), done.stderr
    assert "total: 1 launches" in done.stderr and ", 0 problems" in done.stderr


def test_a_script_that_launches_nothing_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "print('hello')\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "no kernel was launched\n")


def test_a_script_that_fails_shows_its_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, "raise ValueError('its own')\n")
    assert done.returncode == 1
    assert "ValueError: its own" in done.stderr


KERNEL = "@cuda.jit\ndef k(x):\n    x[cuda.grid(1)] = 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (KERNEL + "k[1, 2048](np.zeros(4))\n", "error: a block of (2048, 1, 1)"),
        (KERNEL + "k(np.zeros(4))\n", "error: k was called without a grid and a block"),
        (KERNEL + "k[1](np.zeros(4))\n", "error: k[grid, block, stream, shared]: 1 values given"),
        (
            "@cuda.jit('void(float32[::1])')\ndef k(x):\n    x[0] = 1\nk[1, 1](np.zeros(4))\n",
            "error: k: no signature fits the arguments (array(float64, 1d, C))",
        ),
    ],
)
def test_a_mistake_of_the_user_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    done = run(tmp_path, text)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_a_missing_script_is_a_mistake(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cuda_kernels.emulator", str(tmp_path / "none.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, f"error: no such script: {tmp_path}/none.py\n")
