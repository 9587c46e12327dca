"""The autograd function between a model and the engine of its experts.

Legend: T tokens, D hidden size, E experts, K top-k, r LoRA rank. LoRA factors come stacked, [E, r,
in] and [E, out, r], or shared by all experts, [1, r, in] and [1, out, r].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_sft.engines.protocol import Context, Forward, PlacedExperts
from kt_sft.experts.recompute import Computed, current
from kt_sft.experts.runtime import ExpertsRuntime
from kt_sft.kernels import Call, Inputs


@dataclass(frozen=True)
class LayerPass:
    """One pass through the experts of one layer, besides its tensors.

    scalings: of the LoRA of gate, up and down; None where there is none.
    """

    runtime: ExpertsRuntime
    path: str
    experts: PlacedExperts
    call: Call
    scalings: tuple[float | None, ...]
    counts_tokens: bool  # one layer of the model counts the tokens for the meter
    keep: bool  # backward will follow

    def key(self, inputs: Inputs) -> tuple:
        """What tells this pass from another one of the same layer; see recompute.Computed."""
        shapes = tuple(t.shape for t in inputs.tensors()[3:])
        return id(self.experts), self.call, self.scalings, shapes

    def forward(self, inputs: Inputs) -> Forward:
        """Taken from the first run of a checkpointed function, or computed."""
        checkpoint = current()
        position = checkpoint.next_position() if checkpoint else 0
        key = self.key(inputs)
        first = checkpoint.take(position) if checkpoint else None
        if first is not None and first.key == key:
            again = self.experts.resume(self.call, inputs, first.held)
            if again is not None:
                self.runtime.meter.record_traffic(again.report)
                return again
        keeper = checkpoint if checkpoint and checkpoint.keeps else None
        done = self.experts.forward(self.call, inputs, self.keep, hold=keeper is not None)
        self.runtime.meter.record("forward", done.report, self.experts.layout, 0)
        if not done.report.finite:
            self.runtime.watch.forward(self.path, self.experts, inputs, done.out_TD)
        if keeper is not None and done.held is not None:
            computed = Computed(key, done.held)
            if self.runtime.kept.admit(computed):
                keeper.put(position, computed)
        return done


class ExpertsFunction(torch.autograd.Function):
    """out[T, D] from (hidden[T, D], index[T, K], weight[T, K], a and b of gate, up, down)."""

    @staticmethod
    def forward(ctx: Any, layer: LayerPass, *tensors: Tensor) -> Tensor:
        """On the device of hidden."""
        done = layer.forward(Inputs.of(tensors, layer.scalings))
        if done.context is not None:
            # Tensors only, so that saved-tensor hooks (non-reentrant checkpointing) free them.
            ctx.save_for_backward(*done.context.tensors)
            ctx.layer, ctx.context = layer, replace(done.context, tensors=())
        return done.out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and the LoRA factors, where each of them lives."""
        layer: LayerPass = ctx.layer
        context: Context = replace(ctx.context, tensors=ctx.saved_tensors)
        found, report = layer.experts.backward(
            context, d_out_TD, layer.runtime.gradients_may_wait()
        )
        tokens = d_out_TD.shape[0] if layer.counts_tokens else 0
        layer.runtime.meter.record("backward", report, layer.experts.layout, tokens)
        if not report.finite:
            layer.runtime.watch.backward(layer.path, d_out_TD, found.hidden_TD)
        return None, found.hidden_TD, None, found.weight_TK, *found.lora
