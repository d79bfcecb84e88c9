"""The memory plan against what loading really holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tinyllm.backends import backend_for
from tinyllm.backends.base import Backend
from tinyllm.backends.reference import ReferenceBackend
from tinyllm.cli import main
from tinyllm.cli.plan import _bar_widths
from tinyllm.config import EngineConfig
from tinyllm.engine.kv_cache import max_logits_rows
from tinyllm.engine.model_runner import ModelRunner
from tinyllm.errors import ConfigError
from tinyllm.models.registry import load_model, model_config
from tinyllm.plan import MemoryPlan, plan_memory
from weights import open_checkpoint

MODELS = Path(__file__).parents[1] / "fixtures" / "models"
LLAMA = str(MODELS / "llama.gguf")
NAMES = ("llama", "llama.gguf", "mistral", "qwen2.gguf", "qwen3", "gpt2", "gpt2.gguf", "gemma3")


def plan_of(name: str, engine: EngineConfig, backend: Backend | None = None) -> MemoryPlan:
    with open_checkpoint(MODELS / name) as checkpoint:
        return plan_memory(checkpoint, model_config(checkpoint), engine, backend or ReferenceBackend())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("device", "kv_dtype", "block_size", "max_batch_tokens"),
    [
        *[("reference", "f32", 16, 512), ("reference", "bf16", 7, 33), ("reference", "int8", 7, 33)],
        *[("cpu", "f32", 16, 512), ("cpu", "f16", 48, 33), ("cpu", "int8", 32, 33), ("cpu int8", "auto", 16, 512)],
    ],
)
def test_the_plan_is_exact(name: str, device: str, kv_dtype: str, block_size: int, max_batch_tokens: int) -> None:
    device, _, activations = device.partition(" ")
    engine = EngineConfig(
        kv_dtype=kv_dtype,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        num_blocks=5,
        device=device,
        activations=activations or "f32",
    )
    backend = backend_for(engine)
    plan = plan_of(name, engine, backend)
    with open_checkpoint(MODELS / name) as checkpoint:
        model = load_model(checkpoint, model_config(checkpoint), backend)
        runner = ModelRunner(
            model,
            plan.kv_cache_spec,
            max_batch_tokens=engine.max_batch_tokens,
            max_logits_rows=max_logits_rows(engine),
        )
    assert plan.weights_nbytes == model.nbytes
    assert plan.kv_cache_nbytes == runner.cache.nbytes
    assert plan.workspace_nbytes == runner.workspace.nbytes
    assert plan.num_tokens == 5 * block_size
    assert plan.kv_cache_nbytes == plan.kv_nbytes_per_token * plan.num_tokens
    assert sum(plan.shares().values()) == plan.total_nbytes


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_cache_that_the_device_has_not_is_a_config_error(device: str) -> None:
    engine = EngineConfig(kv_dtype="fp8", device=device)
    with pytest.raises(ConfigError, match=f"^kv_dtype fp8 is for GPUs; the device is {device}$"):
        plan_of("llama.gguf", engine, backend_for(engine))


def test_int8_takes_a_quarter_of_f32_and_its_scales() -> None:
    f32, int8 = (
        plan_of("llama.gguf", EngineConfig(num_blocks=10, kv_dtype=dtype, device="cpu")) for dtype in ("f32", "int8")
    )
    spec = int8.kv_cache_spec
    scales = 2 * 4 * spec.num_layers * spec.num_kv_heads
    assert f32.kv_nbytes_per_token % 4 == 0
    assert int8.kv_nbytes_per_token == f32.kv_nbytes_per_token // 4 + scales


def test_more_blocks_than_memory_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="KV blocks take"):
        plan_of("llama.gguf", EngineConfig(num_blocks=(1 << 27) - 1, block_size=16, device="reference"))


def test_a_small_cache_bounds_the_longest_sequence() -> None:
    assert plan_of("llama.gguf", EngineConfig(num_blocks=2, block_size=16)).max_sequence_len == 32
    assert plan_of("llama.gguf", EngineConfig(num_blocks=64, block_size=16)).max_sequence_len == 64
    assert plan_of("llama.gguf", EngineConfig(num_blocks=64, max_model_len=50)).max_sequence_len == 50


def test_the_cache_gets_what_weights_and_workspace_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineConfig(max_batch_tokens=16)
    plan = plan_of("llama.gguf", engine)
    other = plan.total_nbytes - plan.kv_cache_nbytes
    block = plan.kv_cache_nbytes // plan.num_blocks
    monkeypatch.setattr("tinyllm.backends.host.available_memory", lambda: other + 4 * block)
    tight = plan_of("llama.gguf", engine)
    assert (tight.num_blocks, tight.fits) == (2, True)  # half of what is free, as one sequence needs more than that
    monkeypatch.setattr("tinyllm.backends.host.available_memory", lambda: other // 2)
    assert not plan_of("llama.gguf", engine).fits
    with pytest.raises(ConfigError, match="KV blocks take"):
        plan_of("llama.gguf", EngineConfig(max_batch_tokens=16, num_blocks=1))


def test_a_context_longer_than_the_model_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        plan_of("llama.gguf", EngineConfig(max_model_len=1 << 39))


def test_bar_widths_fill_the_bar() -> None:
    assert _bar_widths([1, 1], 10) == [5, 5]
    assert _bar_widths([10**12, 1, 0], 72) == [71, 1, 0]
    assert _bar_widths([1, 10**12], 72) == [1, 71]
    assert sum(_bar_widths([3, 3, 3, 7], 72)) == 72


# ---- the command


def test_plan_prints_shares_and_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model", LLAMA, "--device", "reference", "--num-blocks", "10", "--kv-dtype", "f16"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    plan = plan_of("llama.gguf", EngineConfig(num_blocks=10, kv_dtype="f16", device="reference"))
    assert "llama.gguf: llama" in out
    assert f"{plan.weights_nbytes:,} bytes" in out
    assert f"{plan.total_nbytes:,} bytes" in out
    assert f"160, {plan.kv_nbytes_per_token:,} bytes each" in out
    assert "10 of 16 tokens, f16" in out
    assert "\x1b" not in out
    assert err == ""


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", LLAMA, "--device", "reference", "--num-blocks", "10", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    plan = plan_of("llama.gguf", EngineConfig(num_blocks=10, device="reference"))
    for name in ("weights", "kv_cache", "workspace", "scratch", "total"):
        assert result[f"{name}_nbytes"] == getattr(plan, f"{name}_nbytes")
    assert (result["num_blocks"], result["num_tokens"], result["fits"]) == (10, 160, True)


def test_a_plot_without_matplotlib_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", "--model", LLAMA, "--plot", "a.svg"]) == 2
    assert capsys.readouterr().err == 'tinyllm: error: --plot needs matplotlib: pip install "tinyllm[plot]"\n'


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_plot(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan{suffix}"
    assert main(["plan", "--model", LLAMA, "--device", "reference", "--plot", str(path)]) == 0
    assert path.stat().st_size > 1000
    assert main(["plan", "--model", LLAMA, "--device", "reference", "--plot", str(tmp_path / "no" / "x.svg")]) == 2
    assert "cannot write" in capsys.readouterr().err
