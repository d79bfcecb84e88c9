"""The buffers that one step writes its activations into, reserved once and sized exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tinyllm.backends.base import Backend, F32Array
from tinyllm.config import ModelConfig

__all__ = ["Activations", "Rotation", "Workspace", "workspace_shapes"]

MAX_VIEWS = 64  # numbers of tokens whose views are kept


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines, (T, R / 2) each: of the tokens' positions, and of where their queries stand for the sinks.

    The latter are set only in steps with such queries; see tinyllm.backends.base.Batch.sink_positions.
    """

    cos: F32Array
    sin: F32Array
    sink_cos: F32Array
    sink_sin: F32Array


def workspace_shapes(config: ModelConfig, max_tokens: int, max_logits_rows: int) -> dict[str, tuple[int, ...]]:
    """The float32 buffers of a step of at most `max_tokens` tokens, `max_logits_rows` of which need logits."""
    T, M, I = max_tokens, config.hidden_size, config.intermediate_size  # noqa: E741
    H, KH, D = config.num_heads, config.num_kv_heads, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "residual": (T, M),
        "normed": (T, M),
        "branch": (T, M),
        "qkv": (T, (H + 2 * KH) * D),
        "attention": (T, H * D),
        "lse": (T, H),
        "mlp": (T, I),
        "logits": (max_logits_rows, config.vocab_size),
    }
    if config.architecture != "gpt2":
        shapes["gate_up"] = (T, 2 * I)
    for name, rope in (("", config.rope), ("local_", config.local_rope)):
        if rope is not None:
            for part in ("cos", "sin", "sink_cos", "sink_sin"):
                shapes[name + part] = (T, rope.rotary_dim // 2)
            shapes["sink_q"] = (T, H * D)
    return shapes


@dataclass(frozen=True, slots=True)
class Activations:
    """Views of the buffers' first T rows. q, k and v are strided views of qkv.

    Attributes:
        residual: (T, M) the residual stream.
        normed, branch: (T, M) a normed residual, and the output of attention or MLP.
        qkv: (T, (H + 2 KH) D); q: (T, H, D); k, v: (T, KH, D)
        sink_q: (T, H, D) the query as the sinks see it; without heads where nothing is rotated.
        lse: (T, H) the logarithms of attention's sums, which nothing reads.
        heads: (T, H, D) attention's output by head; attention: (T, H D), the same memory.
        gate_up: (T, 2I), empty for gpt2; mlp: (T, I)
        rotation, local_rotation: where the model has them.
    """

    residual: F32Array
    normed: F32Array
    branch: F32Array
    qkv: F32Array
    q: F32Array
    k: F32Array
    v: F32Array
    sink_q: F32Array
    lse: F32Array
    heads: F32Array
    attention: F32Array
    gate_up: F32Array
    mlp: F32Array
    rotation: Rotation | None
    local_rotation: Rotation | None


@dataclass(frozen=True)
class Workspace:
    """Buffers by name, as `workspace_shapes` lists them."""

    config: ModelConfig
    buffers: Mapping[str, F32Array]
    _views: dict[int, Activations] = field(default_factory=dict, repr=False, compare=False)  # by number of tokens

    @classmethod
    def allocate(cls, config: ModelConfig, max_tokens: int, max_logits_rows: int, backend: Backend) -> Workspace:
        shapes = workspace_shapes(config, max_tokens, max_logits_rows)
        return cls(config, {name: backend.allocate(shape) for name, shape in shapes.items()})

    @staticmethod
    def size_of(config: ModelConfig, max_tokens: int, max_logits_rows: int) -> int:
        """Bytes that `allocate` will reserve."""
        return 4 * sum(map(math.prod, workspace_shapes(config, max_tokens, max_logits_rows).values()))

    @property
    def nbytes(self) -> int:
        return sum(int(buffer.nbytes) for buffer in self.buffers.values())

    @property
    def max_tokens(self) -> int:
        return int(self.buffers["residual"].shape[0])

    @property
    def max_logits_rows(self) -> int:
        return int(self.buffers["logits"].shape[0])

    def logits(self, rows: int) -> F32Array:
        """(rows, V)"""
        assert rows <= self.max_logits_rows, f"{rows} rows of logits in a workspace for {self.max_logits_rows}"
        return self.buffers["logits"][:rows]

    def hidden(self, tokens: int) -> F32Array:
        """(T, M) what the last step's forward pass left."""
        return self.buffers["normed"][:tokens]

    def activations(self, tokens: int) -> Activations:
        """Views for a step of `tokens` tokens."""
        views = self._views.get(tokens)
        if views is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            views = self._views[tokens] = self._activations(tokens)
        return views

    def _activations(self, tokens: int) -> Activations:
        assert tokens <= self.max_tokens, f"{tokens} tokens in a workspace for {self.max_tokens}"
        H, KH, D = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        b = {name: buffer[:tokens] for name, buffer in self.buffers.items() if name != "logits"}
        rotations = {
            name: Rotation(*(b[name + part] for part in ("cos", "sin", "sink_cos", "sink_sin")))
            for name in ("", "local_")
            if f"{name}cos" in b
        }
        split = b["qkv"].reshape(tokens, H + 2 * KH, D)
        return Activations(
            residual=b["residual"],
            normed=b["normed"],
            branch=b["branch"],
            qkv=b["qkv"],
            q=split[:, :H],
            k=split[:, H : H + KH],
            v=split[:, H + KH :],
            sink_q=b["sink_q"].reshape(tokens, H, D) if "sink_q" in b else split[:, :0],
            lse=b["lse"],
            heads=b["attention"].reshape(tokens, H, D),
            attention=b["attention"],
            gate_up=b.get("gate_up", b["mlp"][:, :0]),
            mlp=b["mlp"],
            rotation=rotations.get(""),
            local_rotation=rotations.get("local_"),
        )
