"""The same model, batches and optimiser in PyTorch: what our trainer is compared with. Nothing else needs PyTorch."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from tinyllm.backends.base import F32Array, I32Array
from training.config import TrainingConfig
from training.parameters import ModelShape, Parameters
from training.trainer import StepResult

__all__ = ["TorchTrainer"]


class _Model(torch.nn.Module):  # type: ignore[misc,unused-ignore]  # Any without PyTorch
    def __init__(self, shape: ModelShape, initial: Parameters) -> None:
        super().__init__()
        self.shape = shape
        self.weights = torch.nn.ParameterDict(
            {name.replace(".", "_"): torch.nn.Parameter(torch.tensor(a)) for name, a in initial.arrays.items()}
        )

    def _rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def forward(self, tokens: Any) -> Any:
        shape, w = self.shape, self.weights
        n, T = tokens.shape
        H, KH, D = shape.num_heads, shape.num_kv_heads, shape.head_dim
        half = D // 2
        powers = -torch.arange(half, dtype=torch.float64, device=tokens.device) / half
        angles = torch.arange(T, dtype=torch.float64, device=tokens.device)[:, None] * shape.rope_theta**powers
        cos, sin = angles.cos().float(), angles.sin().float()
        x = F.embedding(tokens, w["embedding"])
        for i in range(shape.num_layers):
            h = F.rms_norm(x, (shape.hidden_size,), w[f"{i}_attention_norm"], shape.rms_norm_eps)
            heads = F.linear(h, w[f"{i}_qkv"]).view(n, T, H + 2 * KH, D).transpose(1, 2)
            q, k, v = heads.split([H, KH, KH], dim=1)
            q, k = self._rotate(q, cos, sin).to(v.dtype), self._rotate(k, cos, sin).to(v.dtype)
            if KH < H:
                k, v = (a.repeat_interleave(H // KH, dim=1) for a in (k, v))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + F.linear(a.transpose(1, 2).reshape(n, T, H * D), w[f"{i}_o"])
            h = F.rms_norm(x, (shape.hidden_size,), w[f"{i}_mlp_norm"], shape.rms_norm_eps)
            gate, up = F.linear(h, w[f"{i}_gate_up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, w[f"{i}_down"])
        return F.linear(F.rms_norm(x, (shape.hidden_size,), w["norm"], shape.rms_norm_eps), w["embedding"])


class TorchTrainer:
    """Takes the steps that Trainer takes.

    Args:
        bf16: autocast the products and attention to bfloat16.
        compiled: with torch.compile.
    """

    def __init__(
        self, config: TrainingConfig, *, device: str = "cpu", bf16: bool = False, compiled: bool = False
    ) -> None:
        self.config, self.device, self.bf16 = config, device, bf16
        self.done = 0
        self.model = _Model(config.model, Parameters.initial(config.model, config.seed)).to(device)
        self._forward = torch.compile(self.model) if compiled else self.model
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        self._average = [p.detach().clone() for p in self.model.parameters()]

    def _autocast(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext()

    def _loss(self, batch: I32Array) -> Any:
        tokens = torch.from_numpy(batch.astype(np.int64)).to(self.device, non_blocking=True)
        with self._autocast():
            logits = self._forward(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def step(self, batch: I32Array, wait: bool = True) -> StepResult:
        """One step; with `wait` False the result holds NaN instead of waiting for the device."""
        lr = self.config.lr_at(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.done += 1
        with torch.no_grad():
            torch._foreach_lerp_(self._average, list(self.model.parameters()), self.config.average_rate)
        return StepResult(float(loss.detach()) if wait else math.nan, float(norm) if wait else math.nan, lr)

    def evaluate(self, windows: I32Array, sequences: int, *, averaged: bool = False) -> float:
        """The mean loss over windows (n, T + 1), nats per token."""
        current = [p.detach().clone() for p in self.model.parameters()]
        total = 0.0
        with torch.no_grad():
            if averaged:
                torch._foreach_copy_(list(self.model.parameters()), self._average)
            for first in range(0, len(windows), sequences):
                part = windows[first : first + sequences]
                total += float(self._loss(part).detach()) * len(part)
            torch._foreach_copy_(list(self.model.parameters()), current)
        return total / len(windows)

    def average(self) -> Parameters:
        """The averaged weights."""
        result = Parameters(self.config.model)
        for name, value in zip(self.model.weights, self._average, strict=True):
            target: F32Array = result.arrays[name.replace("_", ".", 1) if name[0].isdigit() else name]
            target[...] = value.cpu().numpy()
        return result
