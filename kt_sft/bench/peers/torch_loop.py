"""What a torch user would write: a loop over experts in bf16, with the same LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from kt_sft.bench.case import LayerCase, LayerData, Runner, one_expert, timed
from kt_sft.kernels import PROJECTIONS, Lora

_Factors = dict[str, tuple[tuple[Tensor, ...], tuple[Tensor, ...], float]]


class TorchExpertsLoop:
    """Frozen bf16 weights, LoRA in bf16, one expert after the other."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        experts: int,
        index_TK: Tensor,
        weight_TK: Tensor,
        lora: Lora,
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

    def _linear(self, name: str, expert: int, x: Tensor, factors: _Factors) -> Tensor:
        y = functional.linear(x, self.weights[name][expert])
        if name in factors:
            a, b, scaling = factors[name]
            y = y + scaling * functional.linear(functional.linear(x, a[expert]), b[expert])
        return y

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        """out [T, D]."""
        out = torch.zeros_like(hidden_TD)
        # Unbound once: indexing the stack would add a gradient of its full size for each expert.
        factors: _Factors = {
            name: (a.unbind(0), b.unbind(0), scaling) for name, (a, b, scaling) in self.lora.items()
        }
        for expert in range(self.experts):
            token, choice = torch.where(self.index_TK == expert)
            if token.numel() == 0:
                continue
            x = hidden_TD[token]
            gate, up = (self._linear(n, expert, x, factors) for n in ("gate_proj", "up_proj"))
            y = self._linear("down_proj", expert, functional.silu(gate) * up, factors)
            out.index_add_(0, token, y * self.weight_TK[token, choice, None])
        return out

    def runner(self, hidden_TD: Tensor, d_out_TD: Tensor) -> Runner:
        """Over the same inputs each time."""
        leaf = hidden_TD.detach().clone().requires_grad_()
        leaves = [leaf, self.weight_TK, *(t for a, b, _ in self.lora.values() for t in (a, b))]
        state: dict[str, Tensor] = {}

        def forward() -> None:
            state["out"] = self(leaf)

        def backward() -> None:
            torch.autograd.grad(state.pop("out"), leaves, d_out_TD)

        return timed(forward, backward)


@contextmanager
def start(
    case: LayerCase, data: LayerData, environment: Path | None
) -> Iterator[Mapping[str, Runner]]:
    """One runner, with the case's LoRA."""
    loop = TorchExpertsLoop(
        one_expert(case), case.experts, data.index_TK, data.weight_TK, data.lora
    )
    yield {"torch loop": loop.runner(data.hidden_TD, data.d_out_TD)}
