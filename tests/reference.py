"""The routed experts in fp64, written for reading: the referee of every kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def activation(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "gelu":
        return torch.nn.functional.gelu(x)
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    return x * torch.sigmoid(1.702 * x)


@dataclass
class Experts64:
    """Weights [E, F, D] and [E, D, F], and LoRA (a, b, scaling) or None, all fp64."""

    gate: Tensor
    up: Tensor
    down: Tensor
    act: str
    lora: tuple

    def linear(self, x: Tensor, e: int, which: int, keep: Tensor | None) -> Tensor:
        weight = (self.gate, self.up, self.down)[which][e]
        y = x @ weight.T
        if self.lora[which] is not None:
            a, b, scaling = self.lora[which]
            x = x if keep is None else x * keep
            y = y + scaling * (x @ a[e].T) @ b[e].T
        return y

    def __call__(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, keep=None) -> Tensor:
        """keep(which, slot, width) -> dropout factors of one routed row, or None."""
        out = torch.zeros_like(x_TD)
        experts = self.gate.shape[0]
        for t in range(x_TD.shape[0]):
            row = torch.zeros_like(x_TD[t])
            for k in range(index_TK.shape[1]):
                e = int(index_TK[t, k])
                if e == experts:
                    continue
                slot = t * index_TK.shape[1] + k
                factor = [
                    None if keep is None else keep(i, slot, w)
                    for i, w in enumerate((x_TD.shape[1],) * 2 + (self.down.shape[2],))
                ]
                gate = self.linear(x_TD[t], e, 0, factor[0])
                up = self.linear(x_TD[t], e, 1, factor[1])
                h = activation(self.act, gate) * up
                row = row + weight_TK[t, k] * self.linear(h, e, 2, factor[2])
            out = out + torch.nn.functional.one_hot(
                torch.tensor(t), x_TD.shape[0]
            ).double().unsqueeze(1) * row
        return out
