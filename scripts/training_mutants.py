"""Breaks the trainer on purpose, in one way at a time, and checks that its tests notice.

    python scripts/training_mutants.py [NAME ...]    all mutants, or those whose name contains one of the words

See mutants.py, which makes and runs them.
"""

from __future__ import annotations

import sys

from mutants import Mutant, main

KERNELS = "scripts/training/kernels.py"
BACKEND = "scripts/training/backend.py"
LLAMA = "scripts/training/llama.py"
TRAINER = "scripts/training/trainer.py"
DATA = "scripts/training/data.py"
CHECKPOINT = "scripts/training/checkpoint.py"
CONFIG = "scripts/training/config.py"
EXPORT = "scripts/training/export.py"
LOG = "scripts/training/log.py"
TEXT = "scripts/training/text.py"
PARAMETERS = "scripts/training/parameters.py"
SCRIPT = "scripts/train_bundled.py"


def tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/training/test_{name}.py" for name in names)


MUTANTS = (
    # ---- kernels
    Mutant("the mean term of a norm's gradient", KERNELS, "(g - values * shrink) * inverse", "g * inverse",
           tests("kernels")),
    Mutant("a norm's gradient replaces what was there", KERNELS,
           "load_first(target + 4 * i, lanes) + change, lanes)", "change, lanes)", tests("kernels")),
    Mutant("the gradient of a norm's weight is of the input as it was", KERNELS, "fma(d, values * inverse,",
           "fma(d, values,", tests("kernels")),
    Mutant("the slope of SiLU", KERNELS, "fma(g, splat(1.0) - sigmoid, splat(1.0))",
           "fma(g, sigmoid, splat(1.0))", tests("kernels")),
    Mutant("the gradient of up goes through the gate's slope", KERNELS, "d * (g * sigmoid)", "d * (g * slope)",
           tests("kernels")),
    Mutant("the softmax is not shifted", KERNELS, "columns - i) - splat(m)\n", "columns - i) - splat(0.0)\n",
           tests("kernels")),
    Mutant("the target's gradient is not scaled", KERNELS, "load_f32(source + 4 * target) - scale)",
           "load_f32(source + 4 * target) - 1.0)", tests("kernels")),
    Mutant("lanes past the last logit count", KERNELS,
           "                values = iota_mask(values, 0, columns - i)\n            values = exp(values)",
           "                values = iota_mask(values, 0, 16)\n            values = exp(values)", tests("kernels")),
    Mutant("rows are not added but written", KERNELS,
           "load_first(target + 4 * i, lanes) + load_first(source + 4 * i, lanes), lanes)",
           "load_first(source + 4 * i, lanes), lanes)", tests("kernels")),
    Mutant("shards are summed from the last to the first", KERNELS,
           "load_i64(gradients + 8 * shard)", "load_i64(gradients + 8 * (shards - shard))", tests("kernels")),
    Mutant("the norm is too large", KERNELS, "        total = zeros()\n        for i in range(first",
           "        total = splat(0.01)\n        for i in range(first", tests("kernels")),
    Mutant("vectors decay too", KERNELS, "            if i < decayed:\n", "            if i < size:\n",
           tests("kernels", "trainer")),
    Mutant("no correction of the first moment", KERNELS, "m / splat(correction1)", "m", tests("kernels")),
    Mutant("eps under the root", KERNELS, "(sqrt_lanes(v / splat(correction2)) + splat(eps))",
           "sqrt_lanes(v / splat(correction2) + splat(eps))", tests("kernels")),
    Mutant("the average is of the parameters before the step", KERNELS,
           "            p = p - change * splat(lr)\n            store_first(parameters + at, p, lanes)\n",
           "            store_first(parameters + at, p - change * splat(lr), lanes)\n", tests("kernels")),
    Mutant("beta1 and beta2 are exchanged", BACKEND, "clip, lr, beta1, beta2,", "clip, lr, beta2, beta1,",
           tests("kernels")),
    Mutant("rope's gradient is rotated forwards", BACKEND, "self.rope(dq, dk, cos, -sin)",
           "self.rope(dq, dk, cos, sin)", tests("kernels")),
    # ---- the model
    Mutant("the embedding's gradient without the inputs", LLAMA,
           "        self.backend.add_rows_at(self._dx, inputs, out.embedding)\n", "", tests("gradients")),
    Mutant("the embedding's gradient without the head's later slices", LLAMA,
           "            if i:\n                out.embedding += self._dhead\n", "", tests("gradients")),
    Mutant("a token is its own target", LLAMA, "np.ascontiguousarray(tokens[:, 1:])",
           "np.ascontiguousarray(tokens[:, :-1])", tests("gradients")),
    Mutant("targets of the first slice", LLAMA, "targets[rows], scale,",
           "targets[: rows.stop - rows.start], scale,", tests("gradients")),
    Mutant("the residual around attention has no gradient", LLAMA,
           "        np.matmul(dx.T, a.attention, out=g.o)\n        np.matmul(dx, p.o, out=self._dattention)\n",
           "        np.matmul(dx.T, a.attention, out=g.o)\n        np.matmul(dx, p.o, out=self._dattention)\n"
           "        dx[...] = 0\n", tests("gradients")),
    Mutant("the last batch's gradient is left", LLAMA, "        self._dx[...] = 0\n", "", tests("gradients")),
    Mutant("a norm's weight keeps the last batch's gradient", LLAMA, "        g.mlp_norm[...] = 0\n", "",
           tests("gradients")),
    Mutant("scores are not scaled in the backward pass", LLAMA, "scale=1 / math.sqrt(self.shape.head_dim), dq=",
           "scale=1.0, dq=", tests("gradients")),
    Mutant("other frequencies", LLAMA, "np.arange(half, dtype=np.float64) / half",
           "np.arange(half, dtype=np.float64) / 9",
           tests("gradients")),
    Mutant("the gate is the second half", EXPORT, "layer.gate_up[:I]", "layer.gate_up[I:]", tests("export")),
    Mutant("parameters share their padding", PARAMETERS, "end += -(-length[0] // 16) * 16", "end += length[0]",
           tests("gradients")),
    Mutant("what writes to the residual stream is not made smaller", PARAMETERS,
           'if name.endswith((".o", ".down")):', 'if name.endswith(".o"):', tests("gradients")),
    # ---- steps
    Mutant("the gradient is not clipped", TRAINER, "clip=min(1.0, config.clip / norm) if norm else 1.0", "clip=1.0",
           tests("trainer")),
    Mutant("small gradients are made larger", TRAINER, "min(1.0, config.clip / norm)", "config.clip / norm",
           tests("trainer")),
    Mutant("shards are summed in the order in which they end", TRAINER,
           "                return model.gradients(parameters, tokens, scale, gradients)\n"
           "            finally:\n                self._free.put(model)\n\n"
           "        return sum(self._pool.map(one, shards, out))\n",
           "                loss = model.gradients(parameters, tokens, scale, gradients)\n"
           "                ended.append(gradients)\n                return loss\n"
           "            finally:\n                self._free.put(model)\n\n        ended: list[Parameters] = []\n"
           "        total = sum(self._pool.map(one, shards, list(out)))\n        out[:] = ended\n"
           "        return total\n", tests("trainer")),
    Mutant("a shard's gradients are of its own mean", TRAINER, "shards, 1 / tokens,", "shards, len(shards) / tokens,",
           tests("trainer")),
    Mutant("the rate of the next step", TRAINER, "config.lr_at(state.step)", "config.lr_at(state.step + 1)",
           tests("trainer")),
    Mutant("moments are corrected as in the step before", TRAINER, "step=state.step + 1", "step=max(1, state.step)",
           tests("trainer")),
    Mutant("padding windows count", TRAINER, "self._pool.map(one, padded)))[:n]", "self._pool.map(one, padded)))",
           tests("trainer")),
    Mutant("losses of the last windows for all", TRAINER, "model.losses(parameters, tokens).copy()",
           "model.losses(parameters, tokens)", tests("trainer")),
    Mutant("a step that is not finite is taken", TRAINER, "if not np.isfinite(norm):", "if False:", tests("trainer")),
    # ---- the run
    Mutant("windows overlap", DATA, "np.arange(offset, tokens - length, length)",
           "np.arange(offset, tokens - length, max(1, length - 1))", tests("data")),
    Mutant("every pass begins at the file's beginning", DATA, "int(rng.integers(min(length, tokens - length)))", "0",
           tests("data")),
    Mutant("windows are one token short of the file's end", DATA, "np.arange(offset, tokens - length, length)",
           "np.arange(offset, tokens - length - 1, length)", tests("data")),
    Mutant("stages have the same order", DATA, "key=[self._config.seed, index]", "key=[self._config.seed, 0]",
           tests("data")),
    Mutant("a file's size does not count", DATA, "weight * len(self._tokens[name])", "weight", tests("data")),
    Mutant("the order of the sources matters", DATA, "sorted(stage.sources.items())", "stage.sources.items()",
           tests("data")),
    Mutant("windows are not mixed", DATA, "order = rng.permutation(len(windows))", "order = range(len(windows))",
           tests("data")),
    Mutant("a resumed run begins again", CHECKPOINT, "return State(step, **arrays)", "return State(0, **arrays)",
           tests("checkpoint", "script")),
    Mutant("a resumed run forgets its average", CHECKPOINT, "return State(step, **arrays)",
           'return State(step, **{**arrays, "average": arrays["parameters"].copy()})', tests("script")),
    Mutant("a checkpoint is written in its place", CHECKPOINT, 'path.with_name(path.name + ".partial")', "path",
           tests("checkpoint")),
    Mutant("pickles are read", CHECKPOINT, "allow_pickle=False", "allow_pickle=True", tests("checkpoint")),
    Mutant("a checkpoint of any run will do", CHECKPOINT, 'if header["run"] != run:', "if False:",
           tests("checkpoint")),
    Mutant("the digest leaves out the stages", CONFIG, "json.dumps(asdict(self), sort_keys=True)",
           'json.dumps({**asdict(self), "stages": 0}, sort_keys=True)', tests("config")),
    Mutant("the cosine ends at zero", CONFIG, "(self.final_lr + (1 - self.final_lr) * cosine)", "cosine",
           tests("config")),
    Mutant("lines of the log are doubled", LOG, 'entry["step"] <= step]', 'entry["step"] <= step + 10]',
           tests("log")),
    Mutant("lines of the log are lost", LOG, 'entry["step"] <= step]', 'entry["step"] < step]', tests("log")),
    Mutant("a second signal ends a save", SCRIPT,
           "        checkpoint.save(saved, trainer.state, config.digest())\n    finally:\n",
           "    finally:\n        for n, h in handlers.items():\n            signal.signal(n, h)\n"
           "        checkpoint.save(saved, trainer.state, config.digest())\n", tests("script")),
    Mutant("the weights of the last step are exported", SCRIPT, "config.model, state.average, tokenizer",
           "config.model, state.parameters, tokenizer", tests("script")),
    Mutant("the average's loss is that of the last weights", SCRIPT, "trainer.evaluate(trainer.average, windows)",
           "trainer.evaluate(trainer.parameters, windows)", tests("script")),
    Mutant("documents have no mark", TEXT, 'single=f"{END_OF_TEXT} $A"', 'single="$A"', tests("text")),
    Mutant("queries and keys are exchanged", EXPORT, "q, k, v = np.split(layer.qkv, [H * D, (H + KH) * D])",
           "k, q, v = np.split(layer.qkv, [KH * D, (H + KH) * D])", tests("export")),
    Mutant("bfloat16 is cut off", EXPORT,
           "(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))", "bits", tests("export")),
    Mutant("ties of bfloat16 go up", EXPORT, "np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))",
           "np.uint32(0x8000)", tests("export")),
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(mutants=MUTANTS))
