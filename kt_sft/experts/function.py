"""The autograd functions between a model and the engine of its experts.

Two of them, so that other work can be queued on an accelerator between their sending tensors to the
host and their waiting for its result, forward and backward:

    forward    begin: sends the inputs      [shared experts]    end: waits, computes
    backward   begin: waits, computes       [shared experts]    end: sends the gradient of out

Legend: T tokens, D hidden size, E experts, K top-k, r LoRA rank. LoRA factors come stacked, [E, r,
in] and [E, out, r], or shared by all experts, [1, r, in] and [1, out, r].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_sft.engines.link import Arrival
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

    def forward(self, inputs: Inputs, arriving: Arrival | None) -> Forward:
        """Taken from the first run of a checkpointed function, or computed."""
        checkpoint = current()
        position = checkpoint.next_position() if checkpoint else 0
        key = self.key(inputs)
        first = checkpoint.take(position) if checkpoint else None
        if first is not None and first.key == key:
            again = self.experts.resume(self.call, inputs, arriving, first.held)
            if again is not None:
                self.runtime.meter.record_traffic(again.report)
                return again
        self.runtime.read_ahead("forward", self.path)
        keeper = checkpoint if checkpoint and checkpoint.keeps else None
        done = self.experts.forward(self.call, inputs, arriving, self.keep, hold=keeper is not None)
        self.runtime.meter.record("forward", done.report, self.experts.layout, 0)
        self.runtime.routing.record(self.path, done.report.expert_rows)
        if not done.report.finite:
            self.runtime.watch.forward(self.path, self.experts, inputs, done.out_TD)
        if keeper is not None and done.held is not None:
            computed = Computed(key, done.held)
            if self.runtime.kept.admit(computed):
                keeper.put(position, computed)
        return done


@dataclass(eq=False)
class _Trip:
    """What one pass carries between its two functions; emptied by the second."""

    layer: LayerPass
    inputs: Inputs | None = None
    context: Context | None = None
    d_out_TD: Tensor | None = None
    arriving: Arrival | None = None


class ExpertsBegin(torch.autograd.Function):
    """(hidden [T, D], index [T, K], weight [T, K], a and b of gate, up, down) -> an empty token."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, *tensors: Tensor) -> Tensor:
        """Sends the inputs to where they are computed with."""
        trip.inputs = Inputs.of(tensors, trip.layer.scalings)
        trip.arriving = trip.layer.experts.send(trip.inputs)
        ctx.trip = trip
        return tensors[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and the LoRA factors, where each of them lives."""
        trip: _Trip = ctx.trip
        layer, context, d_out_TD = trip.layer, trip.context, trip.d_out_TD
        assert context is not None and d_out_TD is not None
        layer.runtime.read_ahead("backward", layer.path)
        found, report = layer.experts.backward(
            context, d_out_TD, trip.arriving, layer.runtime.gradients_may_wait()
        )
        trip.context = trip.d_out_TD = trip.arriving = None
        tokens = d_out_TD.shape[0] if layer.counts_tokens else 0
        layer.runtime.meter.record("backward", report, layer.experts.layout, tokens)
        if not report.finite:
            layer.runtime.watch.backward(layer.path, d_out_TD, found.hidden_TD)
        return None, found.hidden_TD, None, found.weight_TK, *found.lora


class ExpertsEnd(torch.autograd.Function):
    """out [T, D] of the token's inputs, on the device of hidden."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, token: Tensor) -> Tensor:
        """Waits for the inputs, and computes."""
        assert trip.inputs is not None
        done = trip.layer.forward(trip.inputs, trip.arriving)
        trip.inputs = trip.arriving = None
        assert done.context is not None
        # Tensors only, so that saved-tensor hooks (non-reentrant checkpointing) free them.
        ctx.save_for_backward(*done.context.tensors)
        ctx.trip, ctx.context = trip, replace(done.context, tensors=())
        return done.out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Sends the gradient of out."""
        trip: _Trip = ctx.trip
        trip.context = replace(ctx.context, tensors=ctx.saved_tensors)
        trip.d_out_TD = d_out_TD
        trip.arriving = trip.layer.experts.send_gradient(trip.context, d_out_TD)
        return None, d_out_TD.new_empty(0)


def run_layer(layer: LayerPass, meanwhile: Callable[[], None], *tensors: Tensor) -> Tensor:
    """out [T, D] from hidden [T, D], index [T, K], weight [T, K], and a and b of gate, up, down.

    meanwhile: what else can be queued on the device of hidden.
    """
    if layer.keep:
        trip = _Trip(layer)
        token = ExpertsBegin.apply(trip, *tensors)
        meanwhile()
        return ExpertsEnd.apply(trip, token)
    inputs = Inputs.of(tensors, layer.scalings)
    arriving = layer.experts.send(inputs)
    meanwhile()
    return layer.forward(inputs, arriving).out_TD
