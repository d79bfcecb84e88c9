"""Makes tests/fixtures/models: tiny random checkpoints of every architecture, with the logits that they should give.

    python -m pip install torch transformers gguf llama-cpp-python     # the last is optional
    python scripts/make_model_fixtures.py [--check-llama-cpp]

For each variant a folder NAME/ with config.json and model.safetensors, as transformers saves them; NAME.gguf, the
same weights by llama.cpp's conventions; and NAME.npz, what transformers computes from them in float32:

    lengths (S,) int32        tokens of each sequence
    token_ids (T,) int32      the sequences, one after another
    logits (T, V) float32     at every position

All weights are random, norms and biases too, and stored without loss in each file's format. Windows, trained
contexts and soft caps are small enough to matter in sequences of this length. With --check-llama-cpp, llama.cpp
runs a float32 form of each GGUF file, and its largest difference from transformers is printed: some 1e-6 of the
logits' range, or 1e-4 with GELU, which it takes from a float16 table. It differs widely for mistral past the window,
which it does not apply to files of llama's architecture.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "models"
LENGTHS = (1, 7, 22)
VOCAB_SIZE = 64

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@dataclass
class Variant:
    """One fixture. `stored` and `stored_gguf` are the formats of matrices; forward: extra arguments of the model."""

    name: str
    model: Any
    config: Any
    stored: torch.dtype
    stored_gguf: str | None
    seed: int
    forward: dict[str, Any] = field(default_factory=dict)


def variants() -> list[Variant]:
    t = transformers
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    linear = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
    gemma3 = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 5}
    return [
        Variant(
            "llama",
            t.LlamaForCausalLM,
            t.LlamaConfig(**SIZES, head_dim=8, rope_parameters=llama3, rms_norm_eps=1e-5),
            torch.float32,
            "F32",
            1,
        ),
        Variant(
            "llama_biased",
            t.LlamaForCausalLM,
            t.LlamaConfig(
                **SIZES, attention_bias=True, mlp_bias=True, rope_parameters=linear, tie_word_embeddings=True
            ),
            torch.bfloat16,
            "F16",
            2,
        ),
        Variant(
            "mistral",
            t.MistralForCausalLM,
            t.MistralConfig(**SIZES, head_dim=6, sliding_window=6),
            torch.float16,
            "F16",
            3,
        ),
        Variant(
            "qwen2",
            t.Qwen2ForCausalLM,
            t.Qwen2Config(**SIZES, tie_word_embeddings=True),
            torch.bfloat16,
            "BF16",
            4,
        ),
        Variant(
            "qwen2_window",
            t.Qwen2ForCausalLM,
            t.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
            torch.bfloat16,
            None,  # GGUF has no key for the layers that slide
            5,
        ),
        Variant("qwen3", t.Qwen3ForCausalLM, t.Qwen3Config(**SIZES, head_dim=8), torch.float16, "F16", 6),
        Variant(
            "gpt2",
            t.GPT2LMHeadModel,
            t.GPT2Config(
                vocab_size=VOCAB_SIZE, n_positions=24, n_embd=16, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2
            ),
            torch.bfloat16,
            "F16",
            7,
        ),
        Variant(
            "gemma3",
            t.Gemma3ForCausalLM,
            t.Gemma3TextConfig(**gemma3 | {"num_hidden_layers": 6}, query_pre_attn_scalar=8),
            torch.bfloat16,
            "F16",
            8,
        ),
        Variant(
            "gemma3_capped",
            t.Gemma3ForCausalLM,
            t.Gemma3TextConfig(
                **gemma3,
                query_pre_attn_scalar=11,
                layer_types=["full_attention", "sliding_attention", "full_attention"],
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 3.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                },
            ),
            torch.float16,
            None,  # GGUF leaves the attention's scale and soft cap unsaid
            9,
            {"softcap": 2.0},  # transformers reads attn_logit_softcapping for gemma3, but does not pass it on
        ),
    ]


def randomise(model: torch.nn.Module, stored: torch.dtype, seed: int) -> None:
    """Draws every parameter: matrices with a gain that keeps attention uneven, norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            values *= 1.0 if "emb" in name or "wte" in name or "wpe" in name else 1.6 * parameter.shape[-1] ** -0.5
        elif name.endswith("weight"):
            centre = 0.0 if model.config.model_type == "gemma3_text" else 1.0
            values = centre + 0.3 * values
        else:
            values *= 0.3
        # whole multiples of 1/1024 with 8 significant bits are the same in float16, bfloat16 and float32
        values = values if stored == torch.float32 else (values.bfloat16().float() * 1024).round() / 1024
        with torch.no_grad():
            parameter.copy_(values if stored == torch.float32 else values.bfloat16().float())


def expected_logits(model: Any, variant: Variant, sequences: list[np.ndarray]) -> np.ndarray:
    """(T, V) over all sequences."""
    with torch.no_grad():
        logits = [
            model(torch.from_numpy(ids[None].astype(np.int64)), use_cache=False, **variant.forward).logits[0]
            for ids in sequences
        ]
    return torch.cat(logits).numpy()


# ---- GGUF


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (i, i + D / 2) pairs to neighbours, as llama's files have q and k."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def llama3_divisors(config: Any) -> np.ndarray:
    """(D / 2,) what Llama 3's scaling divides each rotary frequency by."""
    rope, D = config.rope_parameters, config.head_dim
    divisors = []
    for i in range(0, D, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / D)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - share) / factor + share))
    return np.array(divisors, np.float32)


def write_gguf(path: Path, model: Any, stored: str) -> None:
    """Writes a model by llama.cpp's conventions; norms, biases and divisors are always float32."""
    config = model.config
    kind = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if kind == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        write_rotary_metadata(writer, config, kind)
    write_vocabulary(writer, config)

    parameters = {name: p.detach().float().numpy() for name, p in model.named_parameters()}
    for name, values in parameters.items():
        role = name.rsplit(".", 2)[-2]
        if kind == "llama" and role in ("q_proj", "k_proj"):
            values = permute(values, config.num_attention_heads if role == "q_proj" else config.num_key_value_heads)
        if kind == "gpt2" and role in ("c_attn", "c_proj", "c_fc") and values.ndim == 2:
            values = values.T
        if kind == "gemma3" and name.endswith("norm.weight"):
            values = values + np.float32(1)
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new_name is not None, name
        add_tensor(writer, new_name, np.ascontiguousarray(values), stored if values.ndim == 2 else "F32")
    if kind == "llama" and config.rope_parameters["rope_type"] == "llama3":
        add_tensor(writer, "rope_freqs.weight", llama3_divisors(config), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_rotary_metadata(writer: Any, config: Any, kind: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if kind == "llama":
        writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type in ("mistral", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)


def write_vocabulary(writer: Any, config: Any) -> None:
    """A vocabulary that llama.cpp accepts; the fixtures' prompts are ids."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(config.vocab_size - 3)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3] + [6] * (config.vocab_size - 3))
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def add_tensor(writer: Any, name: str, values: np.ndarray, stored: str) -> None:
    if stored == "F32":
        writer.add_tensor(name, values)
        return
    kind = gguf.GGMLQuantizationType[stored]
    data = gguf.quants.quantize(values, kind)
    assert np.array_equal(gguf.quants.dequantize(data, kind), values), name
    writer.add_tensor(name, data, raw_dtype=kind)


def llama_cpp_logits(path: Path, sequences: list[np.ndarray]) -> np.ndarray:
    import llama_cpp

    llm = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, n_threads=1, verbose=False, type_k=0, type_v=0, flash_attn=False
    )
    rows = []
    for ids in sequences:
        llm.reset()
        llm.eval(ids.tolist())
        rows.append(np.array(llm.scores[: len(ids)]))
    return np.concatenate(rows)


def make(variant: Variant, check_llama_cpp: bool) -> None:
    config = variant.config
    config._attn_implementation = "eager"
    model = variant.model(config).float().eval()
    randomise(model, variant.stored, variant.seed)
    rng = np.random.default_rng(variant.seed)
    sequences = [rng.integers(3, VOCAB_SIZE, n, dtype=np.int32) for n in LENGTHS]
    expected = expected_logits(model, variant, sequences)
    print(f"{variant.name}: logits from {expected.min():.3f} to {expected.max():.3f}", end="")

    if variant.stored_gguf is not None:
        write_gguf(FIXTURES / f"{variant.name}.gguf", model, variant.stored_gguf)
        if check_llama_cpp:
            with tempfile.TemporaryDirectory() as folder:
                write_gguf(Path(folder) / "f32.gguf", model, "F32")
                found = llama_cpp_logits(Path(folder) / "f32.gguf", sequences)
            worst = np.abs(found - expected).max(axis=1) / np.ptp(expected)
            print(f"; llama.cpp differs by {worst.max():.1e} of the range", end="")
            print(" by position: " + " ".join(f"{w:.0e}" for w in worst) if worst.max() > 1e-4 else "", end="")
    folder = FIXTURES / variant.name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(variant.stored).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    (folder / "generation_config.json").unlink(missing_ok=True)
    written = json.loads((folder / "config.json").read_text())
    written.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(written, indent=1) + "\n")
    np.savez_compressed(
        FIXTURES / f"{variant.name}.npz",
        lengths=np.array(LENGTHS, np.int32),
        token_ids=np.concatenate(sequences),
        logits=expected,
    )
    files = [*folder.iterdir(), *FIXTURES.glob(f"{variant.name}.*")]
    print(f"; {sum(f.stat().st_size for f in files) / 1024:.0f} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-llama-cpp", action="store_true", help="compare with llama.cpp as well")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for variant in variants():
        make(variant, arguments.check_llama_cpp)


if __name__ == "__main__":
    main()
