"""How kernels run: threads, the cache of compiled code, scratch memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests.kernels.kernel_cases import Sequences, random_tensor
from tinyllm.backends.cpu import CpuBackend

SCRIPT = """
import sys, numpy as np
from tinyllm.backends.cpu import CpuBackend
backend = CpuBackend(2, on_compile=lambda line: print("COMPILE", line))
x = np.arange(200 * 500, dtype=np.float32).reshape(200, 500)
print(backend.rms_norm(x, np.ones(500, np.float32), 1e-5).tobytes().hex()[:64])
"""


def run_script(cache_folder):
    environment = {**os.environ, "TINYLLM_CACHE": str(cache_folder)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.split("\n")
    return [line for line in lines if line.startswith("COMPILE")], lines[-2]


def test_compiled_kernels_are_kept_and_checked(tmp_path):
    notices, first = run_script(tmp_path)
    assert len(notices) == 1  # however many functions were compiled
    files = sorted(tmp_path.glob("kernels/*/*.bin"))
    assert {"rows.rms_norm", "threads.run_jobs"} <= {f.stem for f in files}
    assert run_script(tmp_path) == ([], first)
    for file in files:  # cut short, altered, emptied
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes({0: content, 1: content[:100], 2: b""}[len(file.name) % 3])
    notices, again = run_script(tmp_path)
    assert (len(notices), again) == (1, first)
    assert run_script(tmp_path) == ([], first)


def test_a_cache_folder_that_cannot_be_made(tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    notices, _ = run_script(occupied)
    assert len(notices) == 1


def _work(backend, rng):
    weight = backend.load_matrix([random_tensor(rng, "Q4_1", (512, 256))])
    x = rng.standard_normal((40, 256)).astype(np.float32)
    return [backend.linear(x[:rows], weight) for rows in (1, 5, 40) for _ in range(20)]


def test_other_threads_and_several_backends_at_once():
    expected = _work(CpuBackend(1), np.random.default_rng(3))
    results: dict[int, list[np.ndarray]] = {}

    def run(i):
        results[i] = _work(CpuBackend(1 + i), np.random.default_rng(3))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert all(np.array_equal(a, b) for a, b in zip(results[i], expected, strict=True))


def test_every_task_runs_once(rng):
    """Tens of thousands of small jobs: a task lost, or done twice by a helper that is late, would show."""
    backend = CpuBackend(4)
    residual = np.zeros((64, 1024), np.float32)
    one = np.ones((64, 1024), np.float32)
    weight, out = np.ones(1024, np.float32), np.empty_like(one)
    for i in range(1, 5001):
        rows = 33 + i % 32
        before = residual[:rows].copy() if i % 100 == 0 else None
        backend.add_rms_norm(residual[:rows], one[:rows], weight, 1e-5, out=out[:rows])
        if before is not None:
            assert np.array_equal(residual[:rows], before + 1)
    assert residual[:33].min() == residual[:33].max() == 5000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_alone(tmp_path):
    script = (
        SCRIPT
        + """
import os
child = os.fork()
if child == 0:
    same = backend.rms_norm(x, np.ones(500, np.float32), 1e-5).tobytes().hex()[:64]
    os._exit(0 if same else 1)
print(os.waitpid(child, 0)[1])
"""
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split("\n")[-2] == "0"


def test_helpers_end_with_their_backend():
    backend = CpuBackend(3)
    _work(backend, np.random.default_rng(3))
    helpers = [t for t in threading.enumerate() if t.name.startswith("tinyllm-")]
    assert len(helpers) >= 2
    del backend
    ours = helpers[-2:]
    for thread in ours:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_workspace_is_known_before(rng):
    backend = CpuBackend(2)
    weight = backend.load_matrix([random_tensor(rng, "Q4_1", (32, 1024))])
    backend.linear(rng.standard_normal((70, 1024)).astype(np.float32), weight)
    assert backend._scratch.nbytes == backend.workspace_nbytes(70, 1024, 1, 1, 8, 16)
    backend = CpuBackend(2)
    sequences = Sequences.random(rng, [2000], 3, 1, 32)
    cache, tables = sequences.fill(backend, 16, "f32", rng)
    for count in range(1, 12):
        q, batch = sequences.batch([(0, 1999, 2000)] * count, tables)
        backend.paged_attention(q, cache.layers[0], batch, scale=0.2)
    context = 16 * tables.shape[1]
    bound = backend.workspace_nbytes(1, 32, 3, 1, 32, context)
    assert 0.8 * bound <= backend._scratch.nbytes <= bound


def test_addresses_of_arrays():
    address = CpuBackend(1)._address_of
    x = np.zeros((6, 8), np.float32)
    for array in (x, x[2:, 3:], x.T, x[1], np.zeros(3, np.int32), np.zeros((0, 4), np.float32)):
        assert address(array) == array.ctypes.data
