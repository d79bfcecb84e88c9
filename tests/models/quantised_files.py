"""Small quantised GGUF files, and the same models with their weights dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

__all__ = ["FORMATS", "VOCAB", "make"]

M, HEADS, KV_HEADS, D, MLP, VOCAB, LAYERS = 256, 8, 4, 32, 512, 64, 2
SHAPES = {
    "token_embd": (VOCAB, M),
    **{
        f"blk.{i}.{name}": shape
        for i in range(LAYERS)
        for name, shape in {
            "attn_q": (HEADS * D, M),
            "attn_k": (KV_HEADS * D, M),
            "attn_v": (KV_HEADS * D, M),
            "attn_output": (M, HEADS * D),
            "ffn_gate": (MLP, M),
            "ffn_up": (MLP, M),
            "ffn_down": (M, MLP),
        }.items()
    },
}
FORMATS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
# the float16 scales of a K-quant's block, by byte: the block, and each scale with the size that it may have
K_SCALES = {
    "Q4_K": (144, {0: 1e-4, 2: 1e-3}),
    "Q5_K": (176, {0: 1e-4, 2: 1e-3}),
    "Q6_K": (210, {208: 3e-5}),
}


def quantised(rng: np.random.Generator, shape: tuple[int, int], kind: str) -> np.ndarray:
    """Random weights as rows of bytes; K-quants, which the gguf package only reads, are random bytes themselves."""
    if kind not in K_SCALES:
        values = (rng.standard_normal(shape) / shape[1] ** 0.5).astype(np.float32)
        return np.asarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]))
    nbytes, scales = K_SCALES[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // 256, nbytes), dtype=np.uint8)
    for at, size in scales.items():
        scale = (size * rng.uniform(0.5, 1.0, blocks.shape[:2])).astype(np.float16)
        blocks[:, :, at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write(path: Path, matrices: dict[str, tuple[np.ndarray, str]]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(M)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, (data, kind) in matrices.items():
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    norms = ["output_norm", *(f"blk.{i}.{name}" for i in range(LAYERS) for name in ("attn_norm", "ffn_norm"))]
    rng = np.random.default_rng(1)
    for name in norms:
        writer.add_tensor(f"{name}.weight", (1 + 0.3 * rng.standard_normal(M)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(folder: Path, kinds: list[str]) -> tuple[Path, Path]:
    """A quantised file, its matrices' formats taken in turn from `kinds`, and its dequantised form."""
    rng = np.random.default_rng(0)
    matrices: dict[str, tuple[np.ndarray, str]] = {}
    plain: dict[str, tuple[np.ndarray, str]] = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        kind = kinds[i % len(kinds)]
        data = quantised(rng, shape, kind)
        values: Any = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        matrices[name], plain[name] = (data, kind), (values.astype(np.float32), "F32")
    write(folder / "quantised.gguf", matrices)
    write(folder / "plain.gguf", plain)
    return folder / "quantised.gguf", folder / "plain.gguf"
