"""Which peers there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["EXACT", "INT8", "PEERS", "PROGRAMS", "REFERENCE", "SAME_FILE", "Entry"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A program, and how it runs the model.

    Attributes:
        name: in options, tables and results.
        program: whose Python runs it.
        module: the one beside this that runs it.
        arithmetic: what it reads and computes with.
        form: the model's form that it reads, as forms.py names it.
        get: how to get the program.
        options: of its `load` and `first_token`.
    """

    name: str
    program: str
    module: str
    arithmetic: str
    form: str
    get: str
    options: Mapping[str, Any] = field(default_factory=dict)


EXACT, INT8, SAME_FILE = "tinyllm", "tinyllm-int8", "llama.cpp"  # the peers that ratios are made of

_TRANSFORMERS = "pip install torch transformers"
_LLAMA_CPP = "pip install llama-cpp-python"

PEERS = (
    Entry(
        name=EXACT,
        program="tinyllm",
        module="peers.tinyllm_peer",
        arithmetic="the file's weights, float32 activations: the default",
        form="gguf",
        get="pip install .",
    ),
    Entry(
        name=INT8,
        program="tinyllm",
        module="peers.tinyllm_peer",
        arithmetic="the file's weights, 8-bit activations: activations='int8'",
        form="gguf",
        get="take a tinyllm that has the engine option",
        options={"activations": "int8"},
    ),
    Entry(
        name=SAME_FILE,
        program="llama.cpp",
        module="peers.llama_cpp_peer",
        arithmetic="the file's weights, 8-bit activations",
        form="gguf",
        get=_LLAMA_CPP,
    ),
    Entry(
        name="llama.cpp-q4_0",
        program="llama.cpp",
        module="peers.llama_cpp_peer",
        arithmetic="all weights in Q4_0 by its own quantiser, 8-bit activations",
        form="q4_0.gguf",
        get=_LLAMA_CPP,
    ),
    Entry(
        name="openvino",
        program="openvino",
        module="peers.openvino_peer",
        arithmetic="the file's weights, offsets rounded to whole steps as its reader does, 8-bit keys and values",
        form="openvino",
        get="pip install openvino-genai",
    ),
    Entry(
        name="onnxruntime",
        program="onnxruntime",
        module="peers.onnxruntime_peer",
        arithmetic="weights rounded to 4 bits again, offsets to whole steps, LM head to 8 bits; 8-bit activations",
        form="onnx-int4 of huggingface",
        get="pip install onnxruntime-genai onnx-ir torch transformers",
    ),
    Entry(
        name="transformers",
        program="transformers",
        module="peers.transformers_peer",
        arithmetic="weights and activations in bfloat16",
        form="huggingface",
        get=_TRANSFORMERS,
        options={"dtype": "bfloat16"},
    ),
)

REFERENCE = Entry(
    name="transformers-float32",
    program="transformers",
    module="peers.transformers_peer",
    arithmetic="the file's weights, all in float32",
    form="huggingface",
    get=_TRANSFORMERS,
    options={"dtype": "float32"},
)

PROGRAMS = tuple(dict.fromkeys(entry.program for entry in PEERS))
