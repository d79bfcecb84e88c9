"""Trains the model that ships with tinyllm: a llama in numpy and numba alone.

    python scripts/train_bundled.py prepare --corpus CORPUS --work WORK      tokenizer and tokens
    python scripts/train_bundled.py train --work WORK                        goes on where it stopped
    python scripts/train_bundled.py export --work WORK --out weights/bundled

CORPUS is a folder of text files whose documents are divided by lines that say <|endoftext|>; valid.txt is held out. The
run is described by scripts/training/bundled.json. Training can be interrupted at any time: the checkpoint in WORK holds
everything, and a run that was resumed gives the same bits as one that was not, on any number of threads.

WORK then holds log.jsonl (a line per step that is reported) and loss.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

# Shards share the cores; inside one, a product's order must not depend on BLAS's threads. Read when numpy is loaded.
for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "BLIS_NUM_THREADS"):
    os.environ[_name] = "1"

from training import checkpoint, export, text  # noqa: E402
from training.config import ConfigError, TrainingConfig  # noqa: E402
from training.data import Batches, load_tokens, validation_windows  # noqa: E402
from training.log import Log, plot  # noqa: E402
from training.trainer import Trainer  # noqa: E402

CONFIG = Path(__file__).parent / "training" / "bundled.json"
VALIDATION = "valid"  # the held-out file, without suffix


def prepare(options: argparse.Namespace) -> None:
    config = TrainingConfig.load(options.config)
    vocab_size = options.vocab_size or config.model.vocab_size
    files = sorted(options.corpus.glob("*.txt"))
    if not any(path.stem == VALIDATION for path in files):
        raise ConfigError(f"{options.corpus} has no {VALIDATION}.txt")
    folder = options.work / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    training = [path for path in files if path.stem != VALIDATION]
    tokenizer = text.train_tokenizer(training, vocab_size)
    tokenizer.save(str(options.work / "tokenizer.json"))
    sizes = {path.stem: path.stat().st_size for path in files}
    (options.work / "bytes.json").write_text(json.dumps(sizes) + "\n")
    for path in files:
        count = text.encode_file(tokenizer, path, folder / f"{path.stem}.npy")
        print(f"{path.stem}: {count:,} tokens, {sizes[path.stem] / count:.2f} bytes each")


def train(options: argparse.Namespace) -> None:
    config = TrainingConfig.load(options.config)
    tokens = load_tokens(options.work / "tokens")
    if VALIDATION not in tokens:
        raise ConfigError(f"{options.work} has no tokens; run `prepare` first")
    batches = Batches(config, tokens)
    if len(tokens[VALIDATION]) <= max(stage.length for stage in config.stages):
        raise ConfigError(f"{VALIDATION!r} has {len(tokens[VALIDATION])} tokens, fewer than a window")
    saved = options.work / "checkpoint.npz"
    size = Trainer.size(config)
    state = checkpoint.load(saved, config.digest(), size) if saved.exists() else None
    trainer = Trainer(config, state, options.threads)
    end = config.steps if options.stop_at is None else min(config.steps, options.stop_at)
    stopping = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    log = Log(options.work / "log.jsonl", trainer.state.step)
    last_save = time.monotonic()
    print(
        f"{config.model.num_parameters:,} parameters, {config.steps} steps, {config.tokens / 1e6:.1f} M tokens; "
        f"{'from the beginning' if state is None else f'from step {state.step}'}",
        flush=True,
    )
    try:
        while trainer.state.step < end and not stopping:
            step = trainer.state.step
            started = time.perf_counter()
            batch = batches.at(step)
            result = trainer.step(batch)
            seconds = time.perf_counter() - started
            line = log.step(step + 1, config.tokens_after(step + 1), result, batch.shape, seconds)
            done = trainer.state.step
            if done % options.validate_every == 0 or done == config.steps:
                most = None if done == config.steps else options.validation_windows
                windows = validation_windows(tokens[VALIDATION], config.stages[config.stage_at(step)[0]].length, most)
                line = log.validation(
                    done,
                    config.tokens_after(done),
                    trainer.evaluate(trainer.parameters, windows),
                    trainer.evaluate(trainer.average, windows),
                )
            if line:
                print(line, flush=True)
            if time.monotonic() - last_save > options.save_every:
                checkpoint.save(saved, trainer.state, config.digest())
                last_save = time.monotonic()
        checkpoint.save(saved, trainer.state, config.digest())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        log.close()
    print(f"stopped after step {trainer.state.step} of {config.steps}; {saved} holds it")
    plot(options.work / "log.jsonl", options.work / "loss.svg")


def export_model(options: argparse.Namespace) -> None:
    config = TrainingConfig.load(options.config)
    saved, tokenizer = options.work / "checkpoint.npz", options.work / "tokenizer.json"
    if not tokenizer.exists():
        raise ConfigError(f"{options.work} has no tokenizer; run `prepare` first")
    state = checkpoint.load(saved, config.digest(), Trainer.size(config))
    if state.step != config.steps and not options.unfinished:
        raise ConfigError(f"{saved} is at step {state.step} of {config.steps}; --unfinished exports it all the same")
    positions = options.positions or max(stage.length for stage in config.stages)
    export.write_folder(options.out, config.model, state.average, tokenizer, positions)
    for path in sorted(options.out.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="prepare | train | export")

    def command(name: str, run: object) -> argparse.ArgumentParser:
        added = commands.add_parser(name, allow_abbrev=False)
        added.set_defaults(run=run)
        added.add_argument("--config", type=Path, default=CONFIG, help="the run's description (%(default)s)")
        added.add_argument("--work", type=Path, required=True, help="folder of tokens, checkpoint and log")
        return added

    prepares = command("prepare", prepare)
    prepares.add_argument("--corpus", type=Path, required=True, help="folder of text files")
    prepares.add_argument(
        "--vocab-size", type=_positive, help="entries of the tokenizer, where not the configuration's"
    )
    trains = command("train", train)
    trains.add_argument("--threads", type=_positive, default=os.cpu_count() or 1, help="worker threads (%(default)s)")
    trains.add_argument("--stop-at", type=_positive, help="end after this step, as if interrupted")
    trains.add_argument("--save-every", type=_positive, default=120, help="seconds between checkpoints (%(default)s)")
    trains.add_argument("--validate-every", type=_positive, default=250, help="steps between (%(default)s)")
    trains.add_argument(
        "--validation-windows", type=_positive, default=128, help="at most, until the end (%(default)s)"
    )
    exports = command("export", export_model)
    exports.add_argument("--out", type=Path, required=True, help="folder of the model")
    exports.add_argument("--positions", type=_positive, help="the longest context (that of the longest stage)")
    exports.add_argument("--unfinished", action="store_true", help="export a run that has not ended")
    options = parser.parse_args()
    try:
        options.run(options)
    except (ConfigError, FloatingPointError, OSError) as error:
        sys.exit(f"train_bundled: {error}")


def _positive(value: str) -> int:
    with suppress(ValueError):
        if (number := int(value)) > 0:
            return number
    raise argparse.ArgumentTypeError(f"{value!r} is not a whole number above 0")


if __name__ == "__main__":
    main()
