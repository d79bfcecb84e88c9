"""CudaBackend under the emulator, end to end: the compiled kernels behind the engine, against the other backends."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from cuda_kernels.errors import KernelArgumentError
from tests.kernels.dense_attention import Dense, assert_exact
from tests.models.harness import difference, expected, fixture_path
from tests.tiny import generate, random_prompt, run_all, tiny_checkpoint, tiny_engine
from tinyllm.backends import backend_for, create_backend
from tinyllm.backends.cuda import CudaBackend
from tinyllm.config import EngineConfig
from tinyllm.engine.kv_cache import kv_cache_spec
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.sequence import Task
from tinyllm.errors import ConfigError
from tinyllm.models.registry import load_model, model_config
from tinyllm.sampling import SamplingParams
from weights import open_checkpoint

EXACT = {"compute_dtype": "f32", "kv_dtype": "f32"}


@lru_cache
def backend(compute_dtype: str = "f32", cuda_graphs: bool = True) -> CudaBackend:
    made = create_backend("cuda-emulated", compute_dtype=compute_dtype, cuda_graphs=cuda_graphs)
    assert isinstance(made, CudaBackend)
    return made


def engine(compute_dtype: str = "f32", cuda_graphs: bool = True, head_dim: int = 8, **options: Any) -> LLMEngine:
    """An engine over the tiny random llama."""
    checkpoint = tiny_checkpoint(head_dim)
    model = load_model(checkpoint, model_config(checkpoint), backend(compute_dtype, cuda_graphs))
    options = {"num_blocks": 64, "kv_dtype": "f32", "max_batch_tokens": 64, "debug_checks": True} | options
    config = EngineConfig(device="cuda-emulated", compute_dtype=compute_dtype, cuda_graphs=cuda_graphs, **options)
    return LLMEngine(model, config, kv_cache_spec(model.config, config, model.backend))


def file_logits(name: str, kind: str, compute_dtype: str, kv_dtype: str) -> np.ndarray:
    """The logits (T, V) of a fixture's sequences, all of them in one batch in chunks."""
    with open_checkpoint(fixture_path(name, kind)) as checkpoint:
        model = load_model(checkpoint, model_config(checkpoint), backend(compute_dtype))
    config = EngineConfig(num_blocks=64, block_size=8, max_batch_tokens=23, kv_dtype=kv_dtype, debug_checks=True)
    llm = LLMEngine(model, config, kv_cache_spec(model.config, config, model.backend))
    sequences, _ = expected(name)
    for index, ids in enumerate(sequences):
        llm.add_request(str(index), ids, SamplingParams(), task=Task.LOGITS)
    outputs = run_all(llm)
    return np.concatenate([outputs[str(index)].rows for index in range(len(sequences))])


# ---- every architecture


@pytest.mark.parametrize("name", ["llama_biased", "qwen3", "gpt2", "gemma3_capped"])
def test_architectures_agree_with_transformers(name: str) -> None:
    """Exact products, float32 cache: as near as the CPU backend must be."""
    assert difference(file_logits(name, "huggingface", "f32", "f32"), expected(name)[1]) < 2e-5


@pytest.mark.parametrize(("compute_dtype", "kv_dtype", "bound"), [("f16", "f32", 2e-3), ("bf16", "f32", 1.5e-2)])
def test_tensor_core_products_are_near(compute_dtype: str, kv_dtype: str, bound: float) -> None:
    """16-bit operands: an error of a few of their roundings, and not less than that."""
    found = difference(file_logits("llama", "huggingface", compute_dtype, kv_dtype), expected("llama")[1])
    assert 1e-6 < found < bound


# ---- the same tokens as on the CPU


def cpu_tokens(prompt: list[int], **params: Any) -> list[int]:
    return generate(tiny_engine("cpu"), prompt, **params)


def test_chunked_prefill_prefix_hits_and_forks_give_the_cpu_s_tokens() -> None:
    prompt = random_prompt(45)
    longer = prompt[:40] + random_prompt(9, seed=5)
    llm = engine(max_batch_tokens=13)
    llm.add_request("a", prompt, SamplingParams(max_tokens=6, temperature=0))
    first = run_all(llm)["a"].outputs[0].token_ids
    assert first == cpu_tokens(prompt, max_tokens=6, temperature=0)
    llm.add_request("b", longer, SamplingParams(max_tokens=6, temperature=0))
    llm.step()
    assert llm.requests["b"].sequences[0].num_computed_tokens == 32 + 13  # two shared blocks of 16, and the budget
    llm.add_request("c", longer, SamplingParams(max_tokens=8, temperature=1, seed=3, n=3))
    outputs = run_all(llm)
    assert outputs["b"].outputs[0].token_ids == cpu_tokens(longer, max_tokens=6, temperature=0)
    cpu = tiny_engine("cpu")
    cpu.add_request("c", longer, SamplingParams(max_tokens=8, temperature=1, seed=3, n=3))
    assert [o.token_ids for o in outputs["c"].outputs] == [o.token_ids for o in run_all(cpu)["c"].outputs]


def test_preemption_and_beams_give_the_cpu_s_tokens() -> None:
    results = []
    for llm in (engine(num_blocks=7), tiny_engine("cpu", num_blocks=7)):
        for index in range(3):
            llm.add_request(
                str(index), random_prompt(20 + index, seed=index), SamplingParams(max_tokens=9, temperature=0)
            )
        llm.add_request("beams", random_prompt(17), SamplingParams(max_tokens=5, beams=3))
        results.append({name: [o.token_ids for o in out.outputs] for name, out in run_all(llm).items()})
    assert results[0] == results[1]


def test_streaming_gives_the_cpu_s_tokens() -> None:
    params = {"max_tokens": 12, "temperature": 0, "window": 24, "sinks": 4}
    assert generate(engine(max_batch_tokens=16), random_prompt(50), **params) == cpu_tokens(random_prompt(50), **params)


# ---- graphs


def test_replayed_steps_give_the_bits_of_eager_ones() -> None:
    """Five sequences, padded to eight; the graph is recorded at the second decode step and launched from then on."""
    rows = []
    for cuda_graphs in (True, False):
        llm = engine(cuda_graphs=cuda_graphs)
        seen: dict[tuple[str, int], bytes] = {}
        llm.observers.append(_LogitsWatcher(seen))
        for index in range(5):
            llm.add_request(str(index), random_prompt(3 + index, seed=index), SamplingParams(max_tokens=5))
        run_all(llm)
        rows.append(seen)
        assert len(getattr(llm.runner._steps, "graphs", ())) == (1 if cuda_graphs else 0)
    assert len(rows[0]) == 25
    assert rows[0] == rows[1]


class _LogitsWatcher:
    wants_logits = True

    def __init__(self, seen: dict[tuple[str, int], bytes]) -> None:
        self.seen = seen

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def logits_used(self, sequence: Any, position: int, logits: np.ndarray) -> None:
        self.seen[sequence.request.request_id, position] = logits.tobytes()


# ---- memory


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "bf16", "int8", "fp8"])
def test_announced_sizes_are_those_taken(kv_dtype: str) -> None:
    llm = engine(kv_dtype=kv_dtype, num_blocks=9, head_dim=16)
    cache = llm.runner.cache
    assert cache.nbytes == backend().kv_cache_nbytes(cache.spec) == sum(layer.nbytes for layer in cache.layers)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_narrow_caches_generate_and_keep_their_bits_through_a_snapshot(kv_dtype: str) -> None:
    def decoded(chunk: int) -> tuple[list[int], Any]:
        llm = engine(kv_dtype=kv_dtype, head_dim=16, max_batch_tokens=chunk)
        llm.add_request("only", random_prompt(21), SamplingParams(max_tokens=4, temperature=0), keep=True)
        tokens = run_kept(llm)
        return tokens, llm.snapshot(llm.take_kept("only"))

    (whole, first), (chunked, second) = decoded(64), decoded(9)
    assert whole == chunked
    assert first.keys.tobytes() == second.keys.tobytes()
    assert first.values.tobytes() == second.values.tobytes()
    llm = engine(kv_dtype=kv_dtype, head_dim=16)
    again = llm.snapshot(llm.restore(first))
    assert again.keys.tobytes() == first.keys.tobytes()
    assert again.values.tobytes() == first.values.tobytes()


def run_kept(llm: LLMEngine) -> list[int]:
    done: list[int] = []
    while llm.has_unfinished_requests():
        for output in llm.step().finished:
            done = output.outputs[0].token_ids
    return done


# ---- dense attention


@pytest.mark.parametrize("causal", [True, False])
def test_dense_attention_and_its_gradients_are_exact_to_a_few_roundings(causal: bool) -> None:
    """Two query heads for each key head; the first queries see nothing where the mask is causal."""
    case = Dense.random(np.random.default_rng(7), 1, 7, 5, 2, 1, 64, causal=causal)
    ops, options = backend(), {"scale": case.scale, "causal": causal}
    q, k, v, dout = (ops.to_device(x) for x in (case.q, case.k, case.v, case.dout))
    places = [ops.allocate(shape) for shape in (q.shape, (1, 2, 7), q.shape, k.shape, v.shape)]
    out, lse, dq, dk, dv = places
    found = ops.flash_attention(q, k, v, out=out, lse=lse, **options)
    found = *found, *ops.flash_attention_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **options)
    assert all(given is returned for given, returned in zip(places, found, strict=True))
    assert_exact(case, [ops.to_host(x) for x in found], roundings=8)  # exp2 and log2 of a GPU are approximate
    out, lse = ops.flash_attention(q, k, v, **options)
    again = out, lse, *ops.flash_attention_backward(dout, q, k, v, out, lse, **options)
    assert [ops.to_host(x).tobytes() for x in again] == [ops.to_host(x).tobytes() for x in found]


def test_dense_attention_that_no_kernel_serves_is_named() -> None:
    ops = backend()
    x = ops.allocate((1, 3, 2, 48))
    with pytest.raises(KernelArgumentError, match="head size 48"):
        ops.flash_attention(x, x, x, scale=1.0)
    wide = ops.allocate((1, 3, 2, 128))[..., :64]
    with pytest.raises(KernelArgumentError, match="C-contiguous"):
        ops.flash_attention(wide, wide, wide, scale=1.0)
    x = ops.allocate((1, 3, 2, 256))
    out, lse = ops.allocate((1, 3, 2, 256)), ops.allocate((1, 2, 3))
    with pytest.raises(KernelArgumentError, match="head size 256"):
        ops.flash_attention_backward(x, x, x, x, out, lse, scale=1.0)


# ---- mistakes


def test_cublas_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        create_backend("cuda-emulated", fast_matmul=True)


def test_a_cache_that_no_attention_kernel_serves_is_named() -> None:
    assert backend("auto").default_kv_dtype(64) == "f16"
    assert backend("auto").default_kv_dtype(12) == "f32"
    with pytest.raises(ConfigError, match="heads of size 8 in int8"):
        engine(kv_dtype="int8")


def test_a_block_size_that_no_kernel_has_is_named() -> None:
    with pytest.raises(ConfigError, match="power of two"):
        engine(block_size=24)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_options_of_the_gpu_are_refused_elsewhere(device: str) -> None:
    for options in ({"compute_dtype": "bf16"}, {"fast_matmul": True}):
        with pytest.raises(ConfigError, match="for GPUs"):
            backend_for(EngineConfig(device=device, **options))
