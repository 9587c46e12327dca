"""The routed experts in fp64, written for reading: the referee of every kernel.

Legend: T tokens, D hidden size, F intermediate size, E experts, K top-k, M rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kt_sft.kernels import Gate

# keep(projection 0..2, slots [M], width) -> factors [M, width] by which dropout multiplies
Keep = Callable[[int, Tensor, int], Tensor]


def activation(gate: Gate, x: Tensor) -> Tensor:
    if gate.activation == "swish":
        return x * torch.sigmoid(gate.alpha * x)
    if gate.activation == "gelu":
        return torch.nn.functional.gelu(x)
    if gate.activation == "gelu_tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    positive = torch.relu(x)
    return positive if gate.activation == "relu" else positive**2


def gated(kind: Gate, gate: Tensor | None, up: Tensor) -> Tensor:
    """h [M, F]; `gate` is None without a gate projection."""
    if gate is None:
        return activation(kind, up.clamp(max=kind.limit))
    value = activation(kind, gate.clamp(max=kind.limit))
    return value * (up.clamp(-kind.limit, kind.limit) + kind.up_offset)


@dataclass
class Experts64:
    """weights: gate (or None), up [E, F, D] and down [E, D, F]; lora: (a, b, scaling) or None;
    bias: [E, outputs] or None; all fp64."""

    weights: tuple[Tensor | None, Tensor, Tensor]
    gate: Gate = Gate()  # noqa: RUF009 - frozen
    lora: tuple = (None, None, None)
    keep: Keep | None = None
    bias: tuple = (None, None, None)

    def _linear(self, x: Tensor, e: int, which: int, slots: Tensor) -> Tensor:
        y = x @ self.weights[which][e].T
        if self.bias[which] is not None:
            y = y + self.bias[which][e]
        if self.lora[which] is None:
            return y
        a, b, scaling = self.lora[which]
        if self.keep is not None:
            x = x * self.keep(which, slots, x.shape[1])
        return y + scaling * (x @ a[e].T) @ b[e].T

    def __call__(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        out = 0 * x_TD  # stays in the graph when there are no rows
        for e in range(self.weights[1].shape[0]):
            token, k = torch.where(index_TK == e)
            if token.numel() == 0:
                continue
            slots = token * index_TK.shape[1] + k
            x = x_TD[token]
            gate = None if self.weights[0] is None else self._linear(x, e, 0, slots)
            up = self._linear(x, e, 1, slots)
            y = self._linear(gated(self.gate, gate, up), e, 2, slots)
            out = out.index_add(0, token, weight_TK[token, k, None] * y)
        return out


_MASK = 2**64 - 1


def dropout_row_key(seed: int, slot: int, projection: int) -> int:
    """splitmix64 of (seed, token and choice, projection), low 32 bits."""
    z = (seed + 0x9E3779B97F4A7C15 * (slot * 3 + projection + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) & 0xFFFFFFFF


def dropout_keep(seed: int, p: float) -> Keep:
    """The masks that the kernels must apply, from the formula."""

    def factors(which: int, slots: Tensor, width: int) -> Tensor:
        rows = []
        column = torch.arange(width, dtype=torch.int64)
        for slot in slots.tolist():
            h = (dropout_row_key(seed, slot, which) + column * 0x9E3779B1) & 0xFFFFFFFF
            h ^= h >> 16
            h = (h * 0x7FEB352D) & 0xFFFFFFFF
            h ^= h >> 15
            h = (h * 0x846CA68B) & 0xFFFFFFFF
            h ^= h >> 16
            dropped = h < int(torch.tensor(p, dtype=torch.float32).double() * 2**32)
            rows.append(torch.where(dropped, 0.0, 1.0 / (1.0 - p)).double())
        return torch.stack(rows)

    return factors
