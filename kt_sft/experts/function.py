"""The autograd function between the accelerator and the CPU experts.

Legend: T tokens, D hidden size, E experts, K top-k, r LoRA rank. LoRA factors come stacked, [E, r,
in] and [E, out, r], or shared by all experts, [1, r, in] and [1, out, r].
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_sft.engines.nodes import SplitWeights
from kt_sft.experts.recompute import Computed, current
from kt_sft.experts.runtime import ExpertsRuntime
from kt_sft.families.shape import ExpertsShape
from kt_sft.kernels import ExpertWeights, LoraFactors


@dataclass(frozen=True)
class ExpertsCall:
    """The part of a call that is not a tensor; constant over forward, recompute and backward."""

    runtime: ExpertsRuntime
    path: str
    weights: ExpertWeights | SplitWeights
    shape: ExpertsShape
    scaling: tuple[float, float, float]
    dropout: float
    dropout_seed: int
    counts_tokens: bool  # one layer of the model counts the tokens for the meter
    keep: bool  # backward will follow

    def key(self, lora: tuple[Tensor, ...]) -> tuple:
        """What tells this call from another one of the same layer; see activations.Computed."""
        shapes = tuple(t.shape for t in lora)
        return id(self.weights), self.scaling, self.dropout, self.dropout_seed, shapes

    def flops(self, rows: int) -> float:
        """Multiply-adds of the three frozen products, counted twice each."""
        return 6.0 * rows * self.shape.hidden * self.shape.intermediate

    def arguments(self, lora: list[LoraFactors | None]) -> dict[str, Any]:
        """The keyword arguments of the engine."""
        return {
            "compute": self.weights.layout.arithmetic or self.runtime.settings.compute,
            "gate": self.shape.gate,
            "lora": lora,
            "dropout": self.dropout,
            "dropout_seed": self.dropout_seed,
        }

    def factors(self, tensors: tuple[Tensor, ...]) -> list[LoraFactors | None]:
        """(a, b) of gate, up and down on the CPU; empty tensors mean no LoRA."""
        stacked = [
            t.expand(self.shape.experts, -1, -1).contiguous() if t.numel() else t for t in tensors
        ]
        return [
            LoraFactors(stacked[2 * i], stacked[2 * i + 1], self.scaling[i])
            if stacked[2 * i].numel()
            else None
            for i in range(3)
        ]


def to_host(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous CPU tensor of `dtype`; copied through pinned memory from an accelerator."""
    tensor = tensor.detach().to(dtype=dtype or tensor.dtype).contiguous()
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)


def _computed(
    call: ExpertsCall,
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    lora: tuple[Tensor, ...],
) -> tuple[Computed, Tensor]:
    """The forward, taken from the first run of a checkpointed function or computed; its output."""
    checkpoint = current()
    position = checkpoint.next_position() if checkpoint else 0
    key = call.key(lora)
    first = checkpoint.take(position) if checkpoint else None
    if first is not None and first.serves(key, index_TK):
        return first, first.out_TD
    keeper = checkpoint if checkpoint and checkpoint.keeps else None
    start = time.perf_counter()
    out_TD, kept, report = call.runtime.engine.forward(
        call.weights,
        hidden_TD,
        index_TK,
        weight_TK,
        keep=call.keep or keeper is not None,
        **call.arguments(call.factors(lora)),
    )
    seconds = time.perf_counter() - start
    flops = call.flops(report.rows)
    call.runtime.meter.record("forward", seconds, flops, report, call.shape.experts, 0)
    watch = call.runtime.watch
    watch.forward(call.path, call.weights, hidden_TD, index_TK, weight_TK, lora, out_TD)
    computed = Computed(key, index_TK, out_TD, kept.tensors() if kept else ())
    if keeper is not None and call.runtime.kept.admit(computed):
        keeper.put(position, computed)
        # The model may write into what it gets.
        return computed, out_TD.clone()
    return computed, out_TD


class ExpertsFunction(torch.autograd.Function):
    """out[T, D] from (hidden[T, D], index[T, K], weight[T, K], a and b of gate, up, down)."""

    @staticmethod
    def forward(
        ctx: Any,
        call: ExpertsCall,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        *lora: Tensor,
    ) -> Tensor:
        """Computes on the host and returns on the device of `hidden`."""
        host_hidden = to_host(hidden_TD)
        host_index = to_host(index_TK, torch.int64)
        host_weight = to_host(weight_TK, torch.float32)
        host_lora = tuple(to_host(t, torch.float32) for t in lora)
        computed, out = _computed(call, host_hidden, host_index, host_weight, host_lora)
        if call.keep:
            # Tensors only, so that saved-tensor hooks (non-reentrant checkpointing) free them.
            ctx.save_for_backward(host_hidden, host_index, host_weight, *host_lora, *computed.kept)
            ctx.call = call
            ctx.like = [(t.device, t.dtype) for t in (hidden_TD, weight_TK, *lora)]
        return out.to(hidden_TD.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and the LoRA factors, where each of them lives."""
        call: ExpertsCall = ctx.call
        hidden, index, weight, *rest = ctx.saved_tensors
        lora, kept = call.factors(tuple(rest[:6])), call.runtime.engine.kept(rest[6:])
        host_d_out = to_host(d_out_TD, hidden.dtype)
        start = time.perf_counter()
        d_hidden, d_weight, d_lora, report = call.runtime.engine.backward(
            call.weights,
            hidden,
            index,
            weight,
            host_d_out,
            kept,
            **call.arguments(lora),
        )
        call.runtime.meter.record(
            "backward",
            time.perf_counter() - start,
            call.flops(report.rows),
            report,
            call.shape.experts,
            hidden.shape[0] if call.counts_tokens else 0,
        )
        call.runtime.watch.backward(call.path, host_d_out, d_hidden)
        flat: list[Tensor | None] = []
        for pair in d_lora:
            flat.extend(pair if pair else (None, None))
        # What is shared gets the gradients of all that use it.
        flat = [
            g.sum(0, keepdim=True) if g is not None and len(t) < len(g) else g
            for g, t in zip(flat, rest[:6], strict=True)
        ]
        gradients = [
            None if g is None else g.to(device=device, dtype=dtype)
            for g, (device, dtype) in zip([d_hidden, d_weight, *flat], ctx.like, strict=True)
        ]
        return None, gradients[0], None, *gradients[1:]
