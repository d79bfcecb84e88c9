"""Which device is taken, and what a user is told where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cuda_kernels.errors import NoDeviceError, ToolMissingError
from tests.models.harness import fixture_path
from tinyllm.backends import create_backend
from tinyllm.backends.cpu import CpuBackend
from tinyllm.cli import main
from tinyllm.errors import DeviceError

MODEL = str(fixture_path("llama", "gguf"))


def test_auto_is_the_cpu_where_no_driver_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda_kernels.gpu.driver_device_count", lambda: 0)
    assert isinstance(create_backend("auto"), CpuBackend)


@pytest.mark.parametrize(
    "error", [NoDeviceError("no NVIDIA GPU can be used: no driver"), ToolMissingError("CuPy is not installed")]
)
def test_a_gpu_that_is_not_there_is_one_clear_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_runtime(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("cuda_kernels.gpu.GpuRuntime", no_runtime)
    with pytest.raises(DeviceError, match="device cuda cannot be used"):
        create_backend("cuda")
    assert main(["generate", "--device", "cuda", "--model", MODEL, "hello"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert str(error) in lines[0]


def test_generating_under_the_emulator_gives_what_the_cpu_gives(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for options in (["--device", "cuda-emulated", "--compute-dtype", "f32", "--kv-dtype", "f32"], ["--device", "cpu"]):
        command = ["generate", "--model", MODEL, "--temperature", "0", "--max-tokens", "4", "--ignore-eos"]
        assert main([*command, *options, "abc"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].strip()


def test_only_the_gpu_s_device_imports_cupy(tmp_path: Path) -> None:
    """Not tinyllm, not the CPU's backend, not "auto" where there is no GPU, not even the emulated device."""
    code = (
        "import sys\n"
        "from tinyllm.backends import create_backend\n"
        "create_backend('cpu'), create_backend('cuda-emulated')\n"
        "sys.exit('cupy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
