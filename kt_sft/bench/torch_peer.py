"""What a torch user would write: a loop over experts in bf16, with the same LoRA."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kt_sft.kernels import PROJECTIONS, LoraFactors

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, as MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ do."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class TorchExpertsLoop:
    """Frozen bf16 weights, LoRA in bf16, one expert after the other."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        experts: int,
        index_TK: Tensor,
        weight_TK: Tensor,
        lora: list[LoraFactors | None],
    ) -> None:
        self.weights = {n: w.unsqueeze(0).repeat(experts, 1, 1) for n, w in weights.items()}
        self.experts = experts
        self.index_TK = index_TK
        self.weight_TK = weight_TK.bfloat16().requires_grad_()
        self.lora = {
            name: (
                f.a.bfloat16().requires_grad_(),
                f.b.bfloat16().requires_grad_(),
                f.scaling,
            )
            for name, f in zip(PROJECTIONS, lora, strict=True)
            if f is not None
        }

    def _linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weights[name][expert])
        if name in self.lora:
            a, b, scaling = self.lora[name]
            y = y + scaling * functional.linear(functional.linear(x, a[expert]), b[expert])
        return y

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        """out [T, D]."""
        out = torch.zeros_like(hidden_TD)
        for expert in range(self.experts):
            token, choice = torch.where(self.index_TK == expert)
            if token.numel() == 0:
                continue
            x = hidden_TD[token]
            gate, up = (self._linear(n, expert, x) for n in ("gate_proj", "up_proj"))
            y = self._linear("down_proj", expert, functional.silu(gate) * up)
            out = out.index_add(0, token, y * self.weight_TK[token, choice, None])
        return out

    def runner(
        self, hidden_TD: Tensor, d_out_TD: Tensor
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """(forward, backward) over the same inputs each time."""
        leaf = hidden_TD.detach().clone().requires_grad_()
        leaves = [leaf, self.weight_TK, *(t for a, b, _ in self.lora.values() for t in (a, b))]
        state: dict[str, Tensor] = {}

        def forward() -> None:
            state["out"] = self(leaf)

        def backward() -> None:
            torch.autograd.grad(state.pop("out"), leaves, d_out_TD)

        return forward, backward
