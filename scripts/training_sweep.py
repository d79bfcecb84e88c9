"""Compares shapes and settings of the bundled model at equal cost, in PyTorch, which a GPU can do in minutes.

    python scripts/training_sweep.py --work WORK --out docs/training_sweep.json

Each variant of scripts/training/sweep.json changes the base configuration, and gets the tokens that two CPU cores train
on in the same time: `rate`, tokens/s of train_bundled.py there, times --minutes. Losses are of the held-out text, in
bits per byte, so that vocabularies can be compared. WORK is a folder that `train_bundled.py prepare` filled; a variant
with another vocabulary reads WORK-<size>. Batches, initial weights and schedule are those of train_bundled.py.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from training.config import ConfigError, TrainingConfig
from training.data import Batches, load_tokens, validation_windows

FOLDER = Path(__file__).parent / "training"


def configuration(base: dict[str, Any], variant: dict[str, Any], minutes: float) -> TrainingConfig:
    """The base with a variant's changes; its stages share out the tokens by their `share`."""
    content = base | {k: v for k, v in variant.items() if k not in ("name", "rate", "stages", "model")}
    content["model"] = base["model"] | variant.get("model", {})
    tokens = variant["rate"] * minutes * 60
    stages = []
    for stage in variant.get("stages", base["stages"]):
        per_step = stage["sequences"] * stage["length"]
        stages.append({**stage, "steps": max(1, round(tokens * stage["share"] / per_step))})
        del stages[-1]["share"]
    return TrainingConfig.parse(content | {"stages": stages})


def run(job: tuple[dict[str, Any], dict[str, Any], float, str, Path]) -> dict[str, Any]:
    base, variant, minutes, device, work = job
    import torch

    from training.torch_twin import TorchTrainer

    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    config = configuration(base, variant, minutes)
    vocab = config.model.vocab_size
    folder = work if vocab == base["model"]["vocab_size"] else work.with_name(f"{work.name}-{vocab}")
    tokens = load_tokens(folder / "tokens")
    held_out_bytes = json.loads((folder / "bytes.json").read_text())["valid"]
    batches, trainer = Batches(config, tokens), TorchTrainer(config, device=device)
    started = time.perf_counter()
    for step in range(config.steps):
        trainer.step(batches.at(step), wait=False)
    result = {
        "name": variant["name"], "parameters": config.model.num_parameters, "tokens": config.tokens,
        "steps": config.steps,
    }  # fmt: skip
    per_byte = len(tokens["valid"]) / held_out_bytes / math.log(2)
    for length in (256, 512):
        windows = validation_windows(tokens["valid"], length)
        for averaged in (False, True):
            loss = trainer.evaluate(windows, 32, averaged=averaged)
            result[f"loss_{length}{'_averaged' if averaged else ''}"] = round(loss, 4)
            result[f"bits_per_byte_{length}{'_averaged' if averaged else ''}"] = round(loss * per_byte, 4)
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variants", type=Path, default=FOLDER / "sweep.json")
    parser.add_argument("--minutes", type=float, default=90.0, help="of two CPU cores, for each (%(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, default=4, help="variants at once (%(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    content = json.loads(options.variants.read_text())
    jobs = [
        (content["base"], variant, options.minutes, options.device, options.work) for variant in content["variants"]
    ]
    try:
        for job in jobs:
            configuration(*job[:3])
    except ConfigError as error:
        sys.exit(f"training_sweep: {error}")
    results = []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for result in pool.imap_unordered(run, jobs, chunksize=1):
            results.append(result)
            print(json.dumps(result), flush=True)
            order = sorted(results, key=lambda r: r["bits_per_byte_256_averaged"])
            options.out.write_text(json.dumps({"minutes": options.minutes, "results": order}, indent=1) + "\n")
    assert np.isfinite([r["loss_256"] for r in results]).all()


if __name__ == "__main__":
    main()
