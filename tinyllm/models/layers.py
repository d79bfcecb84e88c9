"""The parts that decoders share: embeddings and LM head, self-attention, the gated MLP.

Letters as in tinyllm.backends.base. Nothing here allocates arrays in a step: all results go to the workspace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from tinyllm.backends.base import NO_WINDOW, Backend, Batch, F32Array, I32Array, KVCache, Weight
from tinyllm.config import ModelConfig
from tinyllm.models.parameters import Parameters
from tinyllm.models.rope import RotaryTable
from tinyllm.models.workspace import Activations, Rotation, Workspace

__all__ = ["Attention", "Decoder", "GatedMLP"]


class Attention:
    """Self-attention of one layer, its projections and biases; QK-norm (arXiv:2010.04245) where the model has it.

    `qkv` (or its parts) and `o` are the projections, q_norm and k_norm (D,) apply to each head before RoPE.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        parameters: Parameters,
        layer: int,
        *,
        fused: bool = False,
        qk_norm: bool = False,
    ) -> None:
        """fused: whether the checkpoint holds one qkv matrix."""
        M, D = config.hidden_size, config.head_dim
        q_rows, kv_rows = config.num_heads * D, config.num_kv_heads * D
        prefix = f"layers.{layer}."
        last = layer == config.num_layers - 1
        rows = {"qkv": q_rows + 2 * kv_rows} if fused else {"q": q_rows, "k": kv_rows, "v": kv_rows}
        self.qkv: Weight = parameters.matrix(*((prefix + role, (n, M)) for role, n in rows.items()), near_output=last)
        self.qkv_bias: F32Array | None = None
        if config.qkv_bias:
            self.qkv_bias = parameters.vector(*((f"{prefix}{role}_bias", (n,)) for role, n in rows.items()))
        self.o: Weight = parameters.matrix((prefix + "o", (M, q_rows)), near_output=last)
        self.o_bias = parameters.vector((prefix + "o_bias", (M,))) if config.attention_output_bias else None
        self.q_norm = parameters.vector((prefix + "q_norm", (D,))) if qk_norm else None
        self.k_norm = parameters.vector((prefix + "k_norm", (D,))) if qk_norm else None
        self.backend = backend
        self.layer = layer
        self.eps = config.norm_eps
        self.scale = config.attention_scale
        self.softcap = config.attention_softcap
        self.window = config.window_of_layer(layer)

    def __call__(self, a: Activations, rotation: Rotation | None, batch: Batch, cache: KVCache) -> None:
        """a.normed (T, M) -> a.branch (T, M)"""
        ops, layer_cache = self.backend, cache.layers[self.layer]
        ops.linear(a.normed, self.qkv, self.qkv_bias, out=a.qkv)
        if self.q_norm is not None and self.k_norm is not None:
            ops.rms_norm(a.q, self.q_norm, self.eps, out=a.q)
            ops.rms_norm(a.k, self.k_norm, self.eps, out=a.k)
        sink_q = None
        if rotation is not None:
            if self._has_sinks(batch):
                sink_q = a.sink_q
                ops.rotate(a.q, rotation.sink_cos, rotation.sink_sin, out=sink_q)
            ops.rope(a.q, a.k, rotation.cos, rotation.sin)
        ops.write_kv(a.k, a.v, layer_cache, batch.slot_mapping)
        ops.paged_attention(
            a.q,
            layer_cache,
            batch,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sink_q=sink_q,
            out=a.heads,
            lse=a.lse,
        )
        ops.linear(a.attention, self.o, self.o_bias, out=a.branch)

    def _has_sinks(self, batch: Batch) -> bool:
        """Whether some sequence has sinks in this layer: not where the layer's own window is no wider."""
        return batch.extent.sink_window < (NO_WINDOW if self.window is None else self.window)


class GatedMLP:
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202), gate and up as one matrix."""

    def __init__(self, config: ModelConfig, backend: Backend, parameters: Parameters, layer: int) -> None:
        M, I = config.hidden_size, config.intermediate_size  # noqa: E741
        prefix = f"layers.{layer}."
        last = layer == config.num_layers - 1
        gate, up = (prefix + "gate", (I, M)), (prefix + "up", (I, M))
        self.gate_up: Weight = parameters.matrix(gate, up, near_output=last)
        self.down: Weight = parameters.matrix((prefix + "down", (M, I)), near_output=last)
        self.gate_up_bias: F32Array | None = None
        self.down_bias: F32Array | None = None
        if config.mlp_bias:
            self.gate_up_bias = parameters.vector((prefix + "gate_bias", (I,)), (prefix + "up_bias", (I,)))
            self.down_bias = parameters.vector((prefix + "down_bias", (M,)))
        self.backend = backend
        self.act_mul = backend.silu_mul if config.activation == "silu" else backend.gelu_mul

    def __call__(self, a: Activations) -> None:
        """a.normed (T, M) -> a.branch (T, M)"""
        self.backend.linear(a.normed, self.gate_up, self.gate_up_bias, out=a.gate_up)
        self.act_mul(a.gate_up, out=a.mlp)
        self.backend.linear(a.mlp, self.down, self.down_bias, out=a.branch)


class Decoder(ABC):
    """What every architecture has around its layers: embedding, final norm, LM head, rotary tables.

    Attributes:
        nbytes: the parameters as the backend holds them; set by whoever loaded them.
    """

    def __init__(self, config: ModelConfig, backend: Backend, parameters: Parameters) -> None:
        V, M = config.vocab_size, config.hidden_size
        self.config = config
        self.backend = backend
        self.nbytes = 0
        self.embedding: Weight = parameters.matrix(("embedding", (V, M)), near_output=config.tie_word_embeddings)
        self.lm_head: Weight = self.embedding
        if not config.tie_word_embeddings:
            self.lm_head = parameters.matrix(("lm_head", (V, M)), near_output=True)
        self.final_norm = parameters.vector(("final_norm", (M,)))
        self.rotary = None if config.rope is None else RotaryTable(config.rope)
        self.local_rotary = None if config.local_rope is None else RotaryTable(config.local_rope)

    def stage(self, batch: Batch, workspace: Workspace) -> Batch:
        """See tinyllm.models.model.Model."""
        padded = self.backend.padded(batch)
        a = workspace.activations(len(padded.token_ids))
        for table, rotation in ((self.rotary, a.rotation), (self.local_rotary, a.local_rotation)):
            if table is not None and rotation is not None:
                self._look_up(table, padded.positions, rotation.cos, rotation.sin)
                if padded.sink_positions is not None:
                    self._look_up(table, padded.sink_positions, rotation.sink_cos, rotation.sink_sin)
        return self.backend.stage(padded)

    def _look_up(self, table: RotaryTable, positions: I32Array, cos: F32Array, sin: F32Array) -> None:
        """Angles are the host's business: in float64, without end."""
        if self.backend.on_host:
            table.lookup(positions, out=(cos, sin))
            return
        for target, source in zip((cos, sin), table.lookup(positions), strict=True):
            self.backend.upload(target, source)

    def begin(self, batch: Batch, workspace: Workspace) -> Activations:
        """The step's activations, with the embeddings in the residual."""
        a = workspace.activations(len(batch.token_ids))
        self.backend.embedding(batch.token_ids, self.embedding, out=a.residual)
        return a

    @abstractmethod
    def forward(self, batch: Batch, cache: KVCache, workspace: Workspace) -> F32Array:
        """(T, M) after the final norm, in the workspace's `normed`; see tinyllm.models.model.Model."""

    def compute_logits(self, hidden: F32Array, workspace: Workspace) -> F32Array:
        """(R, M) -> (R, V), a view into the workspace."""
        logits = self.backend.linear(hidden, self.lm_head, out=workspace.logits(len(hidden)))
        if self.config.logit_softcap:
            self.backend.softcap(logits, self.config.logit_softcap)
        return logits
