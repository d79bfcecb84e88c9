"""Kernels with one barrier, wait, bound, mask or index changed are noticed, by the emulator or by their results."""

from __future__ import annotations

from pathlib import Path

import pytest

import cuda_kernels
from cuda_kernels.compile import Compiler
from tests.cuda.equivalent_mutants import EQUIVALENT
from tests.cuda.kernel_mutants import KINDS, Mutant, mutant_named, mutants
from tests.cuda.kernel_probes import PROBES
from tests.cuda.mutant_runs import Outcome, outcomes

# what the emulator must call each, or "result" where a comparison must fail; all by a module's first probe
REPRESENTATIVES = {
    "paged_attention_mma._build_attention.attention: cuda.syncthreads() removed (2)": "shared-race",
    "attention_steps._mask_scores.mask_scores: key > high_a -> key >= high_a": "result",
    "flash_attention._build_forward_f32.flash_attention_f32: cuda.syncthreads() removed (2)": "shared-race",
    "flash_attention._build_forward_f32.flash_attention_f32: cp_async_wait(0) -> cp_async_wait(0 + 1)": (
        "unwaited-cp-async"
    ),
    "flash_attention._build_forward_f32.flash_attention_f32: k0 + tx + 16 * j >= end -> False": "result",
    "linear_f32._build_prefill.prefill: cuda.syncthreads() removed": "shared-race",
    "linear_f32._build_prefill.prefill: cp_async_wait(pending) -> cp_async_wait(pending + 1)": "unwaited-cp-async",
    "linear_f32._build_prefill.prefill: row < rows -> True": "out-of-bounds",
    "kv_cache_kernels._build_write_kv.write_kv: slots[token] -> slots[token] + 1": "race",
    "kv_cache_kernels._build_write_kv.write_kv: column < head_dim -> True": "out-of-bounds",
    "sampling._build_sample.block_best: cuda.syncthreads() removed": "shared-race",
    "sampling._load: 0 <= first + 1 < vocab -> 0 <= first + 1 <= vocab": "result",
}


def folder_of(compiler: Compiler) -> Path:
    assert compiler.folder is not None
    return compiler.folder


def test_every_module_of_device_code_has_probes_and_sites_with_names_of_their_own() -> None:
    modules = {path.stem for path in Path(cuda_kernels.__path__[0]).glob("*.py")}
    assert {module for module in modules if mutants(module)} == set(PROBES)
    found = [mutant for module in PROBES for mutant in mutants(module)]
    assert len({mutant.name for mutant in found}) == len(found) > 600
    assert {mutant.kind for mutant in found} == set(KINDS)


def test_equivalent_mutants_are_still_there() -> None:
    for name in EQUIVALENT:
        mutant_named(name)


def test_representative_mutants_of_each_family_are_noticed(compiler: Compiler) -> None:
    chosen = [mutant_named(name) for name in REPRESENTATIVES]
    assert {mutant.kind for mutant in chosen} >= {"barrier", "wait", "bound", "mask", "index"}
    found: dict[Mutant, Outcome] = dict(outcomes(chosen, folder_of(compiler), jobs=2, probes=1))
    for mutant in chosen:
        outcome, expected = found[mutant], REPRESENTATIVES[mutant.name]
        if expected == "result":
            assert outcome.status == "result", f"{mutant.name}: {outcome}"
        else:
            assert outcome.status == "check" and expected in outcome.detail, f"{mutant.name}: {outcome}"


@pytest.mark.slow
@pytest.mark.parametrize("module", PROBES)
def test_every_mutant_is_noticed_or_known_to_make_no_difference(module: str, compiler: Compiler) -> None:
    found = outcomes(mutants(module), folder_of(compiler), jobs=2)
    unnoticed = [
        f"{mutant.name} (line {mutant.line}): {outcome.status} {outcome.detail}"
        for mutant, outcome in found
        if outcome.status not in ("check", "result", "same code") and mutant.name not in EQUIVALENT
    ]
    assert not unnoticed, "\n".join(unnoticed)
