"""`tinyllm info`: what a model file says of itself; no weights are loaded."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tinyllm.cli import console, options
from tinyllm.errors import TinyLLMError

if TYPE_CHECKING:
    from weights import Checkpoint, Tensor

__all__ = ["add_parser"]

_EPILOG = """\
examples:
  tinyllm info --model model.gguf
  tinyllm info --tensors
  tinyllm info --json
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="what a model file says",
        description="Shows a model's architecture, sizes, tensor formats, tokenizer and chat template.",
        epilog=_EPILOG,
    )
    options.add_model_option(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tinyllm.llm import open_model

    with open_model(options.model_name(args)) as checkpoint:
        facts = _facts(checkpoint)
        if args.tensors:
            facts["tensors"] = [
                {"name": name, "shape": list(t.shape), "dtype": t.dtype, "nbytes": t.nbytes}
                for name, t in checkpoint.tensors.items()
            ]
    if args.json:
        console.write(json.dumps(facts) + "\n")
    else:
        console.write(_lines(facts))
    for part in ("model", "tokenizer"):
        if "error" in (facts[part] or {}):
            console.error(facts[part]["error"])
    return 2 if "error" in facts["model"] or "error" in (facts["tokenizer"] or {}) else 0


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "nbytes": sum(t.nbytes for t in checkpoint.tensors.values()),
        "num_tensors": len(checkpoint.tensors),
        "num_parameters": sum(math.prod(t.shape) for t in checkpoint.tensors.values()),
        "formats": _formats(checkpoint.tensors),
        "model": _model(checkpoint),
        "tokenizer": _tokenizer(checkpoint),
    }


def _formats(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """Storage format -> how many tensors and bytes have it, the largest share first."""
    formats: dict[str, dict[str, int]] = {}
    for tensor in tensors.values():
        entry = formats.setdefault(tensor.dtype, {"num_tensors": 0, "nbytes": 0})
        entry["num_tensors"] += 1
        entry["nbytes"] += tensor.nbytes
    return dict(sorted(formats.items(), key=lambda item: -item[1]["nbytes"]))


def _model(checkpoint: Checkpoint) -> dict[str, Any]:
    from tinyllm.models.registry import model_config

    try:
        return asdict(model_config(checkpoint))
    except TinyLLMError as error:
        return {"error": str(error)}


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the tokenizer is; None if the model has none."""
    from tinyllm.llm import load_tokenizer

    try:
        tokenizer = load_tokenizer(checkpoint)
    except TinyLLMError as error:
        return {"error": str(error)}
    if tokenizer is None:
        return None
    names = [checkpoint.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")]
    return {
        "kind": "/".join(name for name in names if isinstance(name, str)) or "tokenizer.json",
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_ids": list(tokenizer.eos_token_ids),
        "num_special_tokens": len(tokenizer.special_token_ids),
        "chat_template": tokenizer.chat_template,
    }


def _lines(facts: dict[str, Any]) -> str:
    rows = [
        ("file", facts["path"]),
        ("kind", facts["kind"]),
        ("tensors", f"{facts['num_tensors']}, {console.format_bytes(facts['nbytes'])} ({facts['nbytes']:,} bytes)"),
        ("parameters", f"{facts['num_parameters']:,}"),
        *(("format", _format_row(name, entry, facts["nbytes"])) for name, entry in facts["formats"].items()),
        *_model_rows(facts["model"]),
        *_tokenizer_rows(facts["tokenizer"]),
    ]
    lines = [f"{name:<14} {console.one_line(str(value))}\n" for name, value in rows]
    for tensor in facts.get("tensors", ()):
        shape = " x ".join(map(str, tensor["shape"]))
        name = console.one_line(tensor["name"], 200)
        lines.append(f"{tensor['dtype']:<5} {tensor['nbytes']:>13,} bytes  {name}  ({shape})\n")
    return "".join(lines)


def _format_row(name: str, entry: Mapping[str, int], total: int) -> str:
    share = entry["nbytes"] / total if total else 0.0
    return f"{name:<5} {share:>6.1%}, {entry['num_tensors']} tensors, {console.format_bytes(entry['nbytes'])}"


def _model_rows(model: Mapping[str, Any]) -> list[tuple[str, object]]:
    if "error" in model:
        return [("architecture", "not supported, or damaged")]
    rope, window, sliding = model["rope"], model["sliding_window"], model["sliding_layers"]
    attention = f"{model['num_heads']} heads, {model['num_kv_heads']} for keys and values, of {model['head_dim']}"
    if any(sliding):
        attention += f"; a window of {window:,} in {sum(sliding)} of {len(sliding)} layers"
    positions = "learned" if rope is None else f"RoPE, theta {rope['theta']:g}, scaling {rope['scaling']}"
    return [
        ("architecture", model["architecture"]),
        ("layers", model["num_layers"]),
        ("hidden size", model["hidden_size"]),
        ("MLP size", model["intermediate_size"]),
        ("attention", attention),
        ("vocabulary", f"{model['vocab_size']:,}"),
        ("context", f"{model['max_position']:,} tokens"),
        ("positions", positions),
    ]


def _tokenizer_rows(tokenizer: Mapping[str, Any] | None) -> list[tuple[str, object]]:
    if tokenizer is None:
        return [("tokenizer", "none: token ids only")]
    if "error" in tokenizer:
        return [("tokenizer", "not supported, or damaged")]
    template = tokenizer["chat_template"]
    ends = ", ".join(map(str, tokenizer["eos_token_ids"])) or "none"
    begin = "none" if tokenizer["bos_token_id"] is None else tokenizer["bos_token_id"]
    size, special = tokenizer["vocab_size"], tokenizer["num_special_tokens"]
    return [
        ("tokenizer", f"{tokenizer['kind']}, {size:,} tokens, {special} of them special; begin {begin}, end {ends}"),
        ("chat template", "none" if template is None else f"yes, {len(template):,} characters"),
    ]
