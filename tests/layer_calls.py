"""Calling the kernels of one layer with plain arguments, as most tests do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kt_sft.kernels import (
    BlockReport,
    Call,
    Engine,
    ExpertWeights,
    Inputs,
    Kept,
    LoraFactors,
    backward,
    forward,
)

LoraList = Sequence[LoraFactors | None]
NO_LORA: LoraList = (None, None, None)


def run_forward(
    engine: Engine,
    weights: ExpertWeights,
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    *,
    keep: bool = False,
    lora: LoraList = NO_LORA,
    **call: Any,
) -> tuple[Tensor, Kept | None, BlockReport]:
    """out, what backward needs if `keep`, and a report; `call` as in Call."""
    inputs = Inputs(hidden_TD, index_TK, weight_TK, tuple(lora))
    return forward(engine, weights, Call(**call), inputs, keep)


def run_backward(
    engine: Engine,
    weights: ExpertWeights,
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    d_out_TD: Tensor,
    kept: Kept,
    *,
    lora: LoraList = NO_LORA,
    **call: Any,
) -> tuple[Tensor, Tensor, Sequence[tuple[Tensor, Tensor] | None], BlockReport]:
    """d_hidden, d_weight, (d_a, d_b) of each LoRA, and a report."""
    inputs = Inputs(hidden_TD, index_TK, weight_TK, tuple(lora))
    found, report = backward(engine, weights, Call(**call), inputs, d_out_TD, kept)
    return found.hidden_TD, found.weight_TK, found.lora, report
