"""Our trainer beside PyTorch: the same model, initial weights, batches and optimiser, on the same CPU, in one run.

    python -m pip install torch
    python scripts/compare_training.py --work WORK --out OUT.json                            throughput
    python scripts/compare_training.py --work WORK --out OUT.json --whole-run --device cuda  PyTorch's whole run
    python scripts/compare_training.py --work WORK --out OUT.json --log WORK/log.jsonl       ours beside it

WORK is a folder that `train_bundled.py prepare` filled. The first form alternates single steps of both, of PyTorch in
float32 and in bfloat16 (autocast), and notes medians; the second trains PyTorch over all batches of the configuration,
wherever it is fast; the third compares its held-out losses with those of our log, and draws both (OUT.svg). Each adds
to OUT.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # numpy's BLAS; PyTorch is told its threads below
    os.environ[_name] = "1"

import numpy as np  # noqa: E402
from measurement import cpu_name  # noqa: E402

from training.config import ConfigError, TrainingConfig  # noqa: E402
from training.data import Batches, load_tokens, validation_windows  # noqa: E402
from training.log import read  # noqa: E402
from training.trainer import Trainer  # noqa: E402

CONFIG = Path(__file__).parent / "training" / "bundled.json"


def machine(threads: int) -> dict[str, Any]:
    import torch

    return {"cpu": cpu_name(), "threads": threads, "numpy": np.__version__, "torch": torch.__version__}


def throughput(config: TrainingConfig, batches: Batches, steps: int, threads: int) -> dict[str, Any]:
    """Medians of single steps, alternating; the first of each is left out."""
    import torch

    from training.torch_twin import TorchTrainer

    torch.set_num_threads(threads)
    trainers = {
        "tinyllm": Trainer(config, None, threads),
        "torch f32": TorchTrainer(config),
        "torch bf16": TorchTrainer(config, bf16=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    for step in range(steps + 1):
        batch = batches.at(step)
        for name, trainer in trainers.items():
            started = time.perf_counter()
            losses[name].append(trainer.step(batch).loss)
            seconds[name].append(time.perf_counter() - started)
    tokens = config.stages[0].tokens
    return {
        "batch": [config.stages[0].sequences, config.stages[0].length],
        "tokens_per_second": {name: round(tokens / float(np.median(s[1:]))) for name, s in seconds.items()},
        "ratio_f32": round(float(np.median(seconds["torch f32"][1:]) / np.median(seconds["tinyllm"][1:])), 3),
        "ratio_bf16": round(float(np.median(seconds["torch bf16"][1:]) / np.median(seconds["tinyllm"][1:])), 3),
        "last_loss": {name: round(values[-1], 5) for name, values in losses.items()},
    }


def whole_run(config: TrainingConfig, tokens: Any, batches: Batches, device: str, every: int) -> dict[str, Any]:
    """PyTorch in float32 over every batch; held-out losses as train_bundled.py takes them."""
    import torch

    from training.torch_twin import TorchTrainer

    torch.set_float32_matmul_precision("highest")
    trainer = TorchTrainer(config, device=device)
    curve = []
    started = time.perf_counter()
    for step in range(config.steps):
        trainer.step(batches.at(step), wait=False)
        done = step + 1
        if done % every == 0 or done == config.steps:
            most = None if done == config.steps else 128
            stage = config.stages[config.stage_at(step)[0]]
            windows = validation_windows(tokens["valid"], stage.length, most)
            loss = trainer.evaluate(windows, stage.sequences)
            averaged = trainer.evaluate(windows, stage.sequences, averaged=True)
            line = {"step": done, "tokens": config.tokens_after(done), "torch": loss, "torch_averaged": averaged}
            curve.append({k: round(v, 5) for k, v in line.items()})
            print(json.dumps(curve[-1]), flush=True)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "configuration": config.digest(), "seconds": round(time.perf_counter() - started, 1), "curve": curve,
    }  # fmt: skip


def join(result: dict[str, Any], config: TrainingConfig, log: Path) -> dict[str, Any]:
    """Adds our log's held-out losses to PyTorch's run of the same configuration."""
    if result.get("configuration") != config.digest():
        raise ConfigError("there is no run of PyTorch with this configuration to compare with")
    ours = {entry["step"]: entry for entry in read(log) if "validation" in entry}
    for line in result["curve"]:
        if (entry := ours.get(line["step"])) is not None:
            line |= {"ours": entry["validation"], "ours_averaged": entry["validation_average"]}
    last = result["curve"][-1]
    if "ours" not in last:
        raise ConfigError(f"{log} does not reach step {last['step']}")
    ratios = {
        "final_ratio": round(last["ours"] / last["torch"], 5),
        "final_ratio_averaged": round(last["ours_averaged"] / last["torch_averaged"], 5),
    }
    return result | ratios


def draw(result: dict[str, Any], config: TrainingConfig, log: Path, out: Path) -> None:
    """Losses over tokens: ours in training and held out, PyTorch's held out; the stages by their context."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "training"  # the same names in every file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    steps = [entry for entry in read(log) if "loss" in entry]
    tokens = [entry["tokens"] / 1e6 for entry in steps]
    axes.plot(tokens, [entry["loss"] for entry in steps], lw=0.6, color="#b0b0b0", label="training")
    curve = [line for line in result["curve"] if "ours" in line]
    tokens = [line["tokens"] / 1e6 for line in curve]
    for key, label, style in (
        ("ours", "held out", {"color": "#0072B2"}),
        ("ours_averaged", "held out, averaged weights", {"color": "#D55E00"}),
        ("torch", "PyTorch, held out", {"color": "#0072B2", "marker": "x", "ls": "none"}),
        ("torch_averaged", "PyTorch, averaged weights", {"color": "#D55E00", "marker": "x", "ls": "none"}),
    ):
        axes.plot(tokens, [line[key] for line in curve], label=label, **style)
    seen = 0
    for stage in config.stages:
        axes.axvline(seen / 1e6, color="#999999", lw=0.7, ls=":")
        axes.text(seen / 1e6, 5.42, f" context {stage.length}", fontsize=8, color="#555555", va="top")
        seen += stage.steps * stage.tokens
    axes.set(
        xlabel="tokens seen (millions)", ylabel="loss (nats per token)", ylim=(2.6, 5.5), xlim=(0, 1.03 * seen / 1e6)
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
    figure.savefig(out, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--whole-run", action="store_true", help="train PyTorch over the whole configuration")
    parser.add_argument("--device", default="cpu", help="of PyTorch's whole run (%(default)s)")
    parser.add_argument("--every", type=int, default=250, help="steps between its validations (%(default)s)")
    parser.add_argument("--log", type=Path, help="our run's log.jsonl, to set beside PyTorch's whole run")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file to add the result to")
    options = parser.parse_args()
    merged = json.loads(options.out.read_text()) if options.out.exists() else {}
    try:
        config = TrainingConfig.load(options.config)
        tokens = load_tokens(options.work / "tokens")
        batches = Batches(config, tokens)
        if options.log is not None:
            result = {"whole_run": join(merged.get("whole_run", {}), config, options.log)}
            draw(result["whole_run"], config, options.log, options.out.with_suffix(".svg"))
        elif options.whole_run:
            run = whole_run(config, tokens, batches, options.device, options.every)
            result = {"whole_run": machine(options.threads) | run}
        else:
            measured = throughput(config, batches, options.steps, options.threads)
            result = {"throughput": machine(options.threads) | measured}
    except ConfigError as error:
        sys.exit(f"compare_training: {error}")
    print(json.dumps(result, indent=1))
    options.out.write_text(json.dumps(merged | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
