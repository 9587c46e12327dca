"""What is measured: one layer of routed experts, and inputs that are the same for everyone.

Legend: T tokens, D hidden size, F intermediate size, E experts, K top-k, r LoRA rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kt_sft.kernels import NO_LORA, PROJECTIONS, Inputs, Lora, LoraFactors

# One forward and the backward that belongs to it: milliseconds of each.
Runner = Callable[[], tuple[float, float]]

LORA_SCALING = 2.0


@dataclass(frozen=True)
class LayerCase:
    """One layer and how it is computed; the defaults are Qwen3-30B-A3B's."""

    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    tokens: int = 2048
    rank: int = 8
    weights: str = "int8"
    compute: str = "exact"
    threads: int = 1
    isa: str = "auto"
    rounds: int = 5
    skew: float = 0.0  # share of the rows that goes to one expert, beyond its fair one
    seed: int = 0

    @property
    def arithmetic(self) -> str:
        """The kernels' compute mode."""
        return "bf16" if self.weights == "bf16" else self.compute

    @property
    def rows(self) -> int:
        """Routed rows."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> float:
        """Of one direction: three frozen products of T * K rows."""
        return 6.0 * self.rows * self.hidden * self.intermediate


@dataclass(frozen=True)
class LayerData:
    """The same inputs for everyone."""

    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    d_out_TD: Tensor
    lora: Lora

    @property
    def inputs(self) -> Inputs:
        """As the kernels take them."""
        return Inputs(self.hidden_TD, self.index_TK, self.weight_TK, self.lora)

    @classmethod
    def make(cls, case: LayerCase) -> LayerData:
        """Gaussian activations in bf16, each token's experts drawn without replacement.

        With `skew`, that share of all choices names expert 0, several times in a token if need be.
        """
        generator = torch.Generator().manual_seed(case.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        scores = torch.rand(case.tokens, case.experts, generator=generator)
        index_TK = scores.topk(case.top_k).indices
        if case.skew:
            index_TK[torch.rand(index_TK.shape, generator=generator) < case.skew] = 0
        lora = NO_LORA
        if case.rank:
            widths = [(case.intermediate, case.hidden)] * 2 + [(case.hidden, case.intermediate)]
            gate, up, down = (
                LoraFactors(
                    normal(case.experts, case.rank, inputs) / inputs**0.5,
                    normal(case.experts, outputs, case.rank) * 0.05,
                    LORA_SCALING,
                )
                for outputs, inputs in widths
            )
            lora = (gate, up, down)
        return cls(
            hidden_TD=normal(case.tokens, case.hidden).bfloat16(),
            index_TK=index_TK,
            weight_TK=torch.rand(case.tokens, case.top_k, generator=generator),
            d_out_TD=normal(case.tokens, case.hidden).bfloat16(),
            lora=lora,
        )


def one_expert(case: LayerCase) -> dict[str, Tensor]:
    """One expert's projections; all experts share the values, not the memory."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    wide = (case.intermediate, case.hidden)
    shapes = (wide, wide, wide[::-1])
    return {
        name: (torch.randn(*shape, generator=generator) / shape[1] ** 0.5).bfloat16()
        for name, shape in zip(PROJECTIONS, shapes, strict=True)
    }


def timed(forward: Callable[[], Any], backward: Callable[[], Any]) -> Runner:
    """The runner of two functions of this process."""

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        forward()
        middle = time.perf_counter()
        backward()
        return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)

    return run
