"""Breaks the engine on purpose, in one way at a time, and checks that its tests notice.

    python scripts/mutants.py [NAME ...]    all mutants, or those whose name contains one of the words

Each mutant is made in a copy of the sources, in a temporary folder, and the tests that should fail are run there. One
line is printed for each; the exit status is 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("tinyllm", "weights", "tests", "scripts", "pyproject.toml")

# a pytest plugin: that there is a failing example is enough
NO_SHRINKING = """
from hypothesis import Phase, settings

settings.register_profile("no shrinking", phases=[Phase.explicit, Phase.generate])
settings.load_profile("no shrinking")
"""

GATE = ("tests/e2e/test_same_bits.py", "-k", "the_reference or preemption_at_every_step or shortage or split_point")
WINDOWS = ("tests/e2e/test_same_bits.py", "-k", "the_reference or smaller_than_the_prompt")
INTERRUPTS = ("tests/e2e/test_same_bits.py", "-k", "interrupted_steps")
NEIGHBOURS = ("tests/e2e/test_same_bits.py", "-k", "test_the_gate and 2-16-2-True")
BOOKKEEPING = ("tests/unit/test_block_manager.py", "tests/unit/test_scheduler.py")
ENGINE = ("tests/unit/test_engine_machine.py", "tests/e2e/test_engine.py")
DENSE = ("tests/kernels/test_flash_attention.py",)
STRUCTURED = ("tests/e2e/test_structured_engine.py",)
GUIDANCE = ("tests/unit/test_guidance.py", "tests/unit/test_structured_output.py")


@dataclass(frozen=True)
class Mutant:
    """One change: `old`, which stands in the file exactly once, becomes `new`; `tests` must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


BATCH = "tinyllm/engine/batch.py"
BLOCKS = "tinyllm/engine/block_manager.py"
SCHEDULER = "tinyllm/engine/scheduler.py"
ENGINE_FILE = "tinyllm/engine/llm_engine.py"
REFERENCE = "tinyllm/backends/reference.py"
DECODING = "tinyllm/engine/decoding.py"
DENSE_OP = "tinyllm/backends/cpu_flash_attention.py"
DENSE_KERNELS = "tinyllm/backends/cpu_kernels/flash_attention.py"
ONLINE_SOFTMAX = "tinyllm/backends/cpu_kernels/online_softmax.py"

MUTANTS = (
    Mutant(
        "two block ids swapped in the batch",
        BATCH,
        "    return result\n",
        "    result[:, :2] = result[:, 1::-1] if result.shape[1] > 1 else result[:, :2]\n    return result\n",
        GATE,
    ),
    Mutant(
        "a block id of the last sequence is off by one row",
        BATCH,
        "row[live : len(table)] = table[live:]",
        "row[live : len(table)] = tables[0][live:len(table)] + table[len(tables[0]):]",
        GATE,
    ),
    Mutant(
        "copies are not carried out",
        "tinyllm/engine/model_runner.py",
        "        if copies:\n",
        "        if False:\n",
        GATE,
    ),
    Mutant(
        "copies go the wrong way",
        "tinyllm/engine/model_runner.py",
        "np.array(copies, np.int32)",
        "np.array([(dst, src) for src, dst in copies], np.int32)",
        GATE,
    ),
    Mutant(
        "copies of a sequence are dropped",
        SCHEDULER,
        "copies=[pair for _, copies in step.chosen.values() for pair in copies]",
        "copies=[pair for _, copies in step.chosen.values() for pair in copies[1:]]",
        GATE,
    ),
    Mutant(
        "a written block is shared by forks",
        BLOCKS,
        "return self.ref_counts[block] == 1 and block not in self._cached",
        "return block not in self._cached",
        GATE,
    ),
    Mutant(
        "a cached block is written",
        BLOCKS,
        "return self.ref_counts[block] == 1 and block not in self._cached",
        "return self.ref_counts[block] == 1",
        BOOKKEEPING,
    ),
    Mutant(
        "a prefix hit of one block too many",
        SCHEDULER,
        "num_tokens = len(prefix) * self.block_manager.block_size\n",
        "num_tokens = len(prefix) * self.block_manager.block_size\n"
        "        if prefix and num_tokens + self.block_manager.block_size < sequence.num_tokens:\n"
        "            prefix, num_tokens = [*prefix, prefix[-1]], num_tokens + self.block_manager.block_size\n",
        BOOKKEEPING,
    ),
    Mutant(
        "a prefix hit of the whole prompt",
        "tinyllm/engine/sequence.py",
        "return self.num_tokens - 1 if reported is None else min(reported, self.num_tokens - 1)",
        "return self.num_tokens if reported is None else min(reported, self.num_tokens)",
        BOOKKEEPING,
    ),
    Mutant(
        "hashes without the parent's",
        "tinyllm/engine/prefix_hash.py",
        'array("q", token_ids).tobytes(), digest_size=HASH_NBYTES, key=parent',
        'array("q", token_ids).tobytes(), digest_size=HASH_NBYTES',
        BOOKKEEPING,
    ),
    Mutant(
        "hashes of all but the last token",
        "tinyllm/engine/prefix_hash.py",
        'array("q", token_ids).tobytes()',
        'array("q", token_ids[:-1]).tobytes()',
        BOOKKEEPING,
    ),
    Mutant(
        "hits are not verified",
        BLOCKS,
        "if found is None or not self._holds(found, sequence, i):",
        "if found is None:",
        BOOKKEEPING,
    ),
    Mutant(
        "hits are verified by their tokens alone",
        BLOCKS,
        "return cached.token_ids == self._tokens(sequence, i) and cached.parent == self._parent(sequence, i)",
        "return cached.token_ids == self._tokens(sequence, i)",
        BOOKKEEPING,
    ),
    Mutant(
        "the salt is ignored",
        "tinyllm/engine/admission.py",
        "root_hash(params.cache_salt, params.window,",
        "root_hash(params.window,",
        ENGINE,
    ),
    Mutant(
        "the window is left out of the hashes",
        "tinyllm/engine/admission.py",
        "root_hash(params.cache_salt, params.window, None if params.window is None else params.sinks)",
        "root_hash(params.cache_salt)",
        ENGINE,
    ),
    Mutant(
        "the reference splits keys by the chunk's length",
        REFERENCE,
        "for start in range(lowest // SPLIT_KEYS * SPLIT_KEYS, p + 1, SPLIT_KEYS)",
        "for SPLIT_KEYS in [256 - int(end_row - first_row) % 50]\n"
        "                    for start in range(lowest // SPLIT_KEYS * SPLIT_KEYS, p + 1, SPLIT_KEYS)",
        GATE,
    ),
    Mutant(
        "the reference's sums run over the whole step",
        REFERENCE,
        "out[t] = np.sum(weight.values * x[t], axis=1)  # pairwise over k, for each output by itself",
        "out[t] = (x @ weight.values.T)[t]",
        GATE,
    ),
    Mutant(
        "the reference does not see the sinks in its window",
        REFERENCE,
        "lowest = 0 if p < sinks + keep else p - keep + 1",
        "lowest = max(0, p - keep + 1)",
        ("tests/kernels/test_streaming.py", "tests/models/test_streaming.py"),
    ),
    Mutant(
        "a window's block is given back one token too early",
        BLOCKS,
        "max(0, num_computed_tokens + 1 - window) // self.block_size",
        "max(0, num_computed_tokens + 2 - window) // self.block_size",
        WINDOWS,
    ),
    Mutant(
        "the sinks' last block is given back",
        BLOCKS,
        "return range(-(-sequence.request.sinks // self.block_size), end)",
        "return range(sequence.request.sinks // self.block_size, end)",
        BOOKKEEPING,
    ),
    Mutant(
        "a snapshot's rows are off by one",
        "tinyllm/engine/parking.py",
        "positions % block_size).astype(np.int32)",
        "(positions + 1) % block_size).astype(np.int32)",
        GATE,
    ),
    Mutant(
        "a snapshot's keys and values are exchanged",
        "tinyllm/engine/parking.py",
        "self.runner.write_kv(slots, snapshot.keys, snapshot.values)",
        "self.runner.write_kv(slots, snapshot.values, snapshot.keys)",
        GATE,
    ),
    Mutant(
        "what an interrupted step was to write stays findable",
        SCHEDULER,
        "        self.block_manager.uncache(output.newly_cached)\n",
        "",
        BOOKKEEPING,
    ),
    Mutant(
        "an interrupted step keeps its blocks",
        SCHEDULER,
        "for sequence in [s for s in self.running if s.request in requests]:",
        "for sequence in [s for s in self.running if s.request in requests][1:]:",
        BOOKKEEPING,
    ),
    Mutant(
        "a finished sequence keeps its references",
        SCHEDULER,
        "        self._take_out(sequence)\n        self.block_manager.free(sequence)\n",
        "        self._take_out(sequence)\n        sequence.block_table = []\n",
        BOOKKEEPING,
    ),
    Mutant(
        "an aborted request keeps its blocks",
        ENGINE_FILE,
        "                self._retire(sequence)\n        if request.params.best_of",
        "                self.scheduler._take_out(sequence)\n        if request.params.best_of",
        NEIGHBOURS,
    ),
    Mutant(
        "an evicted block is still found",
        BLOCKS,
        "            self.uncache([block])\n            self._evicted.append(block)\n",
        "            self._evicted.append(block)\n",
        BOOKKEEPING,
    ),
    Mutant(
        "the most recently used blocks are evicted first",
        BLOCKS,
        "self._free.popitem(last=False)",
        "self._free.popitem(last=True)",
        BOOKKEEPING,
    ),
    Mutant(
        "a chain's beginning is evicted first",
        BLOCKS,
        "for block in reversed(sequence.block_table):",
        "for block in sequence.block_table:",
        BOOKKEEPING,
    ),
    Mutant(
        "the first is preempted, not the last",
        SCHEDULER,
        "return max(self.running, key=lambda s: (s.order[:2], s.num_due_tokens == 0, s.index))",
        "return min(self.running, key=lambda s: (s.order[:2], s.num_due_tokens == 0, s.index))",
        BOOKKEEPING,
    ),
    Mutant(
        "beams at rest never make room for the others",
        SCHEDULER,
        "return max(self.running, key=lambda s: (s.order[:2], s.num_due_tokens == 0, s.index))",
        "return max(self.running, key=lambda s: s.order)",
        BOOKKEEPING,
    ),
    Mutant(
        "a given back prefix is resumed",
        SCHEDULER,
        " and self.block_manager.sees_all(parent, resumed)",
        "",
        BOOKKEEPING,
    ),
    Mutant(
        "an interrupt at its end makes a sequence one token longer",
        "tinyllm/engine/decoding.py",
        " and sequence.finish_reason is None:",
        ":",
        ENGINE,
    ),
    Mutant(
        "forks draw the same noise",
        "tinyllm/engine/sequence.py",
        "        return (self.index,)\n",
        "        return (0,)\n",
        GATE,
    ),
    Mutant(
        "dense attention: dS is not scaled",
        DENSE_KERNELS,
        "p * (load(row_dscores + 4 * j) - row_delta) * splat(scale)",
        "p * (load(row_dscores + 4 * j) - row_delta)",
        DENSE,
    ),
    Mutant(
        "dense attention: dS without delta",
        DENSE_KERNELS,
        "(load(row_dscores + 4 * j) - row_delta)",
        "load(row_dscores + 4 * j)",
        DENSE,
    ),
    Mutant(
        "dense attention: a query sees one key too many",
        DENSE_KERNELS,
        "visible = min(n_keys, first + r + shift + 1 - key)",
        "visible = min(n_keys, first + r + shift + 2 - key)",
        DENSE,
    ),
    Mutant(
        "dense attention: a query sees one key too few",
        DENSE_KERNELS,
        "visible = min(n_keys, first + r + shift + 1 - key)",
        "visible = min(n_keys, first + r + shift - key)",
        DENSE,
    ),
    Mutant(
        "dense attention: backward, a query sees one key too many",
        DENSE_KERNELS,
        "min(n_keys, visible + r)",
        "min(n_keys, visible + r + 1)",
        DENSE,
    ),
    Mutant(
        "dense attention: backward, a query sees one key too few",
        DENSE_KERNELS,
        "min(n_keys, visible + r)",
        "min(n_keys, visible + r - 1)",
        DENSE,
    ),
    Mutant(
        "dense attention: the mask is aligned at the beginning",
        DENSE_OP,
        "K - Q if causal else K",
        "0 if causal else K",
        DENSE,
    ),
    Mutant(
        "dense attention: dk and dv leave out a head of a group",
        DENSE_KERNELS,
        "range(kv_head * group, kv_head * group + group)",
        "range(kv_head * group + min(1, group - 1), kv_head * group + group)",
        DENSE,
    ),
    Mutant(
        "dense attention: query heads take key heads in turn",
        DENSE_KERNELS,
        "values = _row_of(arrays, 1, n, 0, h // group)",
        "values = _row_of(arrays, 1, n, 0, h % kv_heads)",
        DENSE,
    ),
    Mutant(
        "dense attention: tiles of keys from the last to the first",
        DENSE_KERNELS,
        "            tile = tiles + key // TILE * tile_nbytes\n            _multiply(",
        "            tile = tiles + (k_tiles - 1 - key // TILE) * tile_nbytes\n            _multiply(",
        DENSE,
    ),
    Mutant(
        "dense attention: tiles of another batch",
        DENSE_KERNELS,
        "tiles = keys + (n * kv_heads + h // group) * k_tiles",
        "tiles = keys + (h // group) * k_tiles",
        DENSE,
    ),
    Mutant(
        "dense attention: lanes past the last key are not zeroed",
        DENSE_KERNELS,
        "for j in range(rows, TILE):",
        "for j in range(TILE, TILE):",
        DENSE,
    ),
    Mutant(
        "dense attention: dk and dv start a tile of queries too late",
        DENSE_KERNELS,
        "start = max(0, key - shift) // TILE * TILE",
        "start = (max(0, key - shift) + TILE - 1) // TILE * TILE",
        DENSE,
    ),
    Mutant(
        "dense attention: the accumulator is not rescaled",
        ONLINE_SOFTMAX,
        "load(acc + 4 * d) * keep)",
        "load(acc + 4 * d))",
        DENSE,
    ),
    Mutant(
        "dense attention: the sum is not rescaled",
        ONLINE_SOFTMAX,
        "load(state + 64) * keep)",
        "load(state + 64))",
        DENSE,
    ),
    Mutant(
        "dense attention: values past the last are read",
        DENSE_KERNELS,
        "_multiply_add(scores, _PITCH, 4, values + key * v_row, v_row, n_keys,",
        "_multiply_add(scores, _PITCH, 4, values + key * v_row, v_row, TILE,",
        DENSE,
    ),
    Mutant(
        "dense attention: keys past the last are read",
        DENSE_KERNELS,
        "k_rows + key * k_row, k_row, n_keys,",
        "k_rows + key * k_row, k_row, TILE,",
        DENSE,
    ),
    Mutant(
        "dense attention: queries past the last are read",
        DENSE_KERNELS,
        "dout_rows, dout_row, rows, v_acc",
        "dout_rows, dout_row, TILE, v_acc",
        DENSE,
    ),
    Mutant(
        "dense attention: old scores where a row of a tile sees nothing",
        DENSE_KERNELS,
        "                    _clear(scores + r * _PITCH, _PITCH)\n",
        "                    pass\n",
        DENSE,
    ),
    Mutant(
        "dense attention: dv goes on from the last tile",
        DENSE_KERNELS,
        "        _clear(v_acc, n_keys * acc_pitch)\n",
        "",
        DENSE,
    ),
    Mutant(
        "dense attention: workers share their scratch",
        DENSE_KERNELS,
        "scores = scratch + worker * scratch_stride",
        "scores = scratch",
        DENSE,
    ),
    Mutant(
        "dense attention: a row alone is rounded in another way",
        DENSE_KERNELS,
        "emit_fma(b, lanes[v], scalars[r], accs[r * vectors + v])\n",
        "(emit_fma(b, lanes[v], scalars[r], accs[r * vectors + v]) if rows > 1 else\n"
        "                     b.fadd(b.fmul(lanes[v], scalars[r]), accs[r * vectors + v]))\n",
        DENSE,
    ),
    Mutant(
        "dense attention: all scores have a place in memory",
        DENSE_OP,
        "self._reserve(self.num_threads * worker_nbytes + transposed)",
        "self._reserve(self.num_threads * worker_nbytes + transposed + 4 * N * H * Q * K)",
        DENSE,
    ),
    Mutant(
        "dense attention: the reference does not scale dS",
        REFERENCE,
        "dscores = f32(scale) * probs *",
        "dscores = probs *",
        DENSE,
    ),
    Mutant(
        "dense attention: the reference's gradients are those of the last head",
        REFERENCE,
        "dv[at] += probs",
        "dv[at] = probs",
        DENSE,
    ),
    Mutant(
        "structured output: forks share a matcher",
        DECODING,
        "child.matcher = parent.matcher.copy()",
        "child.matcher = parent.matcher",
        STRUCTURED,
    ),
    Mutant(
        "structured output: a complete text goes on",
        DECODING,
        "self._followed(sequence, sequence.matcher).finished:",
        "not self._followed(sequence, sequence.matcher):",
        STRUCTURED,
    ),
    Mutant(
        "structured output: a beam does not end where its text is complete",
        DECODING,
        "found._replace(completing=frozenset(completing))",
        "found",
        STRUCTURED,
    ),
    Mutant(
        "structured output: a device draws the token",
        "tinyllm/engine/device_sampling.py",
        "        and params.structured_output is None\n",
        "",
        STRUCTURED,
    ),
    Mutant(
        "structured output: ids are taken for places among those allowed",
        "tinyllm/sampling.py",
        "kept = places if ids is None else ids[places]",
        "kept = places",
        STRUCTURED,
    ),
    Mutant(
        "structured output: the end is allowed anywhere",
        "tinyllm/guidance/matcher.py",
        "if words[end] >> np.uint32(bit) & np.uint32(1):",
        "if end >= 0:",
        GUIDANCE,
    ),
    Mutant(
        "structured output: a text may be spelled with special tokens",
        "tinyllm/guidance/vocabulary.py",
        "and i not in self._special for i in ids)",
        "for i in ids)",
        GUIDANCE,
    ),
    Mutant(
        "structured output: what is used often is forgotten first",
        "tinyllm/guidance/compiler.py",
        "                self._kept.move_to_end(structured_output)\n                return",
        "                return",
        GUIDANCE,
    ),
    Mutant(
        "structured output: brackets in strings nest",
        "tinyllm/structured_output.py",
        "elif not in_string and",
        "elif",
        GUIDANCE,
    ),
)


def tests_fail(folder: Path, file: str, tests: Sequence[str]) -> bool:
    """Whether one of the tests fails in `folder`, whose `file` is changed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-p",
        "no_shrinking",
        *tests,
    ]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    if file.startswith(("tinyllm/backends/cpu_kernels/", "scripts/training/kernels")):  # wanted only once
        environment["TINYLLM_CACHE"] = str(folder / "cache")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run {' '.join(tests)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main(argv: Sequence[str] | None = None, mutants: Sequence[Mutant] = MUTANTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    wanted = parser.parse_args(argv).names
    chosen = [m for m in mutants if not wanted or any(word in m.name for word in wanted)]
    survived = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder)
        (folder / "no_shrinking.py").write_text(NO_SHRINKING, encoding="utf-8")
        for mutant in chosen:
            file = folder / mutant.file
            original = file.read_text(encoding="utf-8")
            if original.count(mutant.old) != 1:
                raise SystemExit(f"{mutant.name}: {mutant.file} has its place {original.count(mutant.old)} times")
            start = time.monotonic()
            file.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
            killed = tests_fail(folder, mutant.file, mutant.tests)
            file.write_text(original, encoding="utf-8")
            survived += not killed
            print(
                f"{'killed' if killed else 'SURVIVED':8}  {time.monotonic() - start:5.0f} s  {mutant.name}", flush=True
            )
    print(f"{len(chosen) - survived} of {len(chosen)} mutants killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
