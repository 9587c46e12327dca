"""Layers whose experts are parted between the host and an accelerator, or all on the accelerator.

The host learns where each token goes, a policy parts the experts, and both sides compute at once;
results are sums. Packed weights, and the host's arithmetic, are another engine's.

Legend: T tokens, D hidden size, K top-k, E experts, r LoRA rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kt_sft.device.block import LoraGradients
from kt_sft.device.bringing import bring
from kt_sft.engines.cpu import CpuEngine, CpuExperts
from kt_sft.engines.host import HostExperts, brought, context_of
from kt_sft.engines.link import Arrival, Traffic, Wanted, link_of
from kt_sft.engines.nodes import NodeEngines, NodeExperts
from kt_sft.engines.protocol import (
    Context,
    Forward,
    Held,
    Home,
    LayerGradients,
    Report,
    Share,
)
from kt_sft.engines.share import DeviceShare
from kt_sft.kernels import (
    BlockReport,
    Call,
    CodedMatrix,
    Engine,
    ExpertWeights,
    Inputs,
    WeightLayout,
    rows_by_expert,
)
from kt_sft.kernels.checks import is_finite
from kt_sft.scheduling.assignment import HostOnly, Policy

# Of a layer, once it is known which device the model is on.
PolicyOf = Callable[["PartedExperts", torch.device], Policy]


class PartedExperts(HostExperts):
    """The experts of one layer, of which an accelerator computes some in each pass.

    inner: as the host computes them. share: None where the whole layer's weights are not in one
    place on the host.
    """

    def __init__(self, inner: CpuExperts | NodeExperts, policy_of: PolicyOf) -> None:
        super().__init__()
        self.inner, self._policy_of = inner, policy_of
        self.share = DeviceShare(inner.weights) if isinstance(inner, CpuExperts) else None

    @property
    def layout(self) -> WeightLayout:
        """See PlacedExperts."""
        return self.inner.layout

    @property
    def nbytes(self) -> int:
        """See PlacedExperts; on the host."""
        return self.inner.nbytes

    def pack(self, expert: int, projection: str, weight: Tensor) -> None:
        """See PlacedExperts."""
        self.inner.pack(expert, projection, weight)

    def pack_codes(self, expert: int, projection: str, matrix: CodedMatrix) -> None:
        """See PlacedExperts."""
        self.inner.pack_codes(expert, projection, matrix)

    def set_bias(self, expert: int, projection: str, bias: Tensor) -> None:
        """See PlacedExperts."""
        self.inner.set_bias(expert, projection, bias)

    def take_channels(self, source: ExpertWeights, first: int = 0) -> None:
        """See PlacedExperts; of memory nodes' parts, the accelerator reads the source."""
        self.inner.take_channels(source, first)
        if self.share is None and source.layout == self.layout:
            self.share = DeviceShare(source)

    def take_experts(self, source: ExpertWeights, experts: Sequence[int]) -> None:
        """See PlacedExperts."""
        self.inner.take_experts(source, experts)

    def unpack(self, expert: int, projection: str) -> Tensor:
        """See PlacedExperts."""
        return self.inner.unpack(expert, projection)

    def _forward(
        self, call: Call, inputs: Inputs, keep: bool, out_TD: Tensor
    ) -> tuple[tuple[Tensor, ...], BlockReport]:
        return self.inner._forward(call, inputs, keep, out_TD)

    def _backward(
        self,
        call: Call,
        inputs: Inputs,
        d_out_TD: Tensor,
        kept: tuple[Tensor, ...],
        into: tuple[Tensor, Tensor],
    ) -> tuple[Any, BlockReport]:
        return self.inner._backward(call, inputs, d_out_TD, kept, into)

    def _part(self, rows: Sequence[int], device: torch.device, backward_follows: bool) -> Share:
        """What the accelerator computes of a pass."""
        assert self.share is not None
        policy = self._policy_of(self, device)
        places = policy.assign(rows, self.share.resident, backward_follows)
        return Share(places, tuple(rows[e] for e in places.on_device))

    def _streamed_bytes(self, share: Share, device: torch.device) -> int:
        each = self.share.expert_bytes if self.share is not None and device.type != "cpu" else 0
        return len(share.places.streamed) * each

    def _forward_staged(
        self,
        call: Call,
        inputs: Inputs,
        staged: Inputs,
        rows: tuple[int, ...],
        keep: bool,
        hold: bool,
        traffic: Traffic,
    ) -> Forward:
        if self.share is None:
            return super()._forward_staged(call, inputs, staged, rows, keep, hold, traffic)
        experts = self.layout.experts
        share = self._part(rows, inputs.hidden_TD.device, keep or hold)
        if not share.rows:
            done = super()._forward_staged(call, inputs, staged, rows, keep, hold, traffic)
            held = done.held and replace(done.held, share=share)
            context = done.context and _with_share(done.context, share, inputs, experts)
            return done._replace(context=context, held=held)
        working = self.share.forward(call, share, inputs)
        try:
            rest = _left_for_host(staged, share, experts)
            done = super()._forward_staged(call, inputs, rest, rows, keep, hold, traffic)
            # NaN that the accelerator makes is seen by the layer that it reaches.
            finite = done.report.finite and is_finite(staged.hidden_TD)
        finally:
            wait([working])  # whatever happens: it reads the inputs
        out_TD = (done.out_TD.float() + working.result()).to(done.out_TD.dtype)
        traffic.bytes_up += self._streamed_bytes(share, inputs.hidden_TD.device)
        report = replace(
            done.report,
            rows=sum(rows),
            max_rows=max(rows),
            finite=finite,
            device_rows=sum(share.rows),
        )
        held = done.held
        if held is not None:
            # The model may write into what it gets.
            index_TK, out = staged.index_TK.clone(), out_TD.clone()
            held = replace(held, index_TK=index_TK, out_TD=out, share=share)
        context = done.context and _with_share(done.context, share, inputs, experts)
        return Forward(out_TD, context, held, report)

    def _resume_staged(
        self, call: Call, inputs: Inputs, staged: Inputs, held: Held, traffic: Traffic
    ) -> Forward | None:
        share, experts = held.share, self.layout.experts
        if share is None or not share.rows:
            done = super()._resume_staged(call, inputs, staged, held, traffic)
            if share is None or done is None or done.context is None:
                return done
            return done._replace(context=_with_share(done.context, share, inputs, experts))
        if not torch.equal(held.index_TK, staged.index_TK):
            return None
        rest = _left_for_host(staged, share, experts)
        context = _with_share(context_of(call, inputs, rest, held.kept), share, inputs, experts)
        report = Report(0, 0, 0.0, finite=True, traffic=traffic)
        return Forward(held.out_TD.clone(), context, held, report)

    def backward(
        self,
        context: Context,
        d_out_TD: Tensor,
        arriving: Arrival | None,
        lora_may_wait: bool = False,
    ) -> tuple[LayerGradients, Report]:
        """See PlacedExperts."""
        if not context.share_tensors:
            return super().backward(context, d_out_TD, arriving, lora_may_wait)
        own, inputs, share = _parted(context)
        if self.share is None or not share.rows:
            return super().backward(own, d_out_TD, arriving, lora_may_wait)
        working = self.share.backward(context.call, share, inputs, d_out_TD)
        try:
            found, report = super().backward(own, d_out_TD, arriving, lora_may_wait)
        finally:
            wait([working])
        more, traffic = working.result(), report.traffic
        traffic.bytes_up += self._streamed_bytes(share, d_out_TD.device)
        added = _lora_gradients(context.lora, more.lora, share, self.layout.experts, traffic)
        lora = tuple(
            a if b is None else b if a is None else a.add_(b)
            for a, b in zip(found.lora, added, strict=True)
        )
        gradients = LayerGradients(
            (found.hidden_TD.float() + more.hidden_TD).to(found.hidden_TD.dtype),
            found.weight_TK + more.weight_TK.to(found.weight_TK.dtype),
            lora,
        )
        theirs = sum(share.rows)
        report = replace(report, rows=report.rows + theirs, device_rows=theirs)
        return gradients, replace(report, max_rows=max(report.max_rows, *share.rows))


class DeviceExperts(PartedExperts):
    """The experts of one layer, all computed on the accelerator: the host learns only how many rows
    each of them gets. Without an accelerator the host computes them."""

    def _is_parted(self, device: torch.device) -> bool:
        return self.share is None or isinstance(self._policy_of(self, device), HostOnly)

    @staticmethod
    def _wanted_here(inputs: Inputs) -> list[Wanted]:
        """The choices, and a number that is finite where all hidden states are."""
        hidden_TD = inputs.hidden_TD
        largest = hidden_TD.abs().amax() if hidden_TD.numel() else hidden_TD.new_zeros(())
        return [(inputs.index_TK, torch.int64), (largest.reshape(1), torch.float32)]

    def send(self, inputs: Inputs) -> Arrival | None:
        """See PlacedExperts."""
        device = inputs.hidden_TD.device
        if self._is_parted(device) or device.type == "cpu":
            return super().send(inputs)
        return link_of(device).send_down(self._wanted_here(inputs))

    def send_gradient(self, context: Context, d_out_TD: Tensor) -> Arrival | None:
        """See PlacedExperts; what is on the device alone is there already."""
        return None if _is_alone(context) else super().send_gradient(context, d_out_TD)

    def forward(
        self, call: Call, inputs: Inputs, arriving: Arrival | None, keep: bool, hold: bool = False
    ) -> Forward:
        """See PlacedExperts."""
        device = inputs.hidden_TD.device
        if self.share is None or self._is_parted(device):
            return super().forward(call, inputs, arriving, keep, hold)
        start, traffic = time.perf_counter(), Traffic()
        wanted = self._wanted_here(inputs) if arriving is None else []
        with brought(arriving, [wanted], traffic) as ((index_TK, largest),):
            rows = rows_by_expert(index_TK, self.layout.experts)
            index_TK, finite = index_TK.clone(), is_finite(largest)
        share = self._part(rows, device, keep or hold)
        total_TD = self.share.forward(call, share, inputs).result()
        traffic.bytes_up += self._streamed_bytes(share, device)
        out_TD = total_TD.to(inputs.hidden_TD.dtype)
        seconds, count = time.perf_counter() - start, sum(rows)
        report = Report(count, max(rows), seconds, finite, traffic, rows, device_rows=count)
        context = self._alone(call, share, inputs) if keep else None
        held = Held(index_TK, out_TD.clone(), (), share) if hold else None
        return Forward(out_TD, context, held, report)

    def resume(
        self, call: Call, inputs: Inputs, arriving: Arrival | None, held: Held
    ) -> Forward | None:
        """See PlacedExperts."""
        if held.share is None or self._is_parted(inputs.hidden_TD.device):
            return super().resume(call, inputs, arriving, held)
        traffic = Traffic()
        wanted = self._wanted_here(inputs) if arriving is None else []
        with brought(arriving, [wanted], traffic) as ((index_TK, _),):
            if not torch.equal(held.index_TK, index_TK):
                return None
        context = self._alone(call, held.share, inputs)
        report = Report(0, 0, 0.0, finite=True, traffic=traffic)
        return Forward(held.out_TD.clone(), context, held, report)

    def backward(
        self,
        context: Context,
        d_out_TD: Tensor,
        arriving: Arrival | None,
        lora_may_wait: bool = False,
    ) -> tuple[LayerGradients, Report]:
        """See PlacedExperts; whether the gradient of hidden is finite is not looked at, as the host
        would have to wait for it."""
        if self.share is None or not _is_alone(context):
            return super().backward(context, d_out_TD, arriving, lora_may_wait)
        start, traffic = time.perf_counter(), Traffic()
        _, inputs, share = _parted(context)
        found = self.share.backward(context.call, share, inputs, d_out_TD).result()
        traffic.bytes_up += self._streamed_bytes(share, d_out_TD.device)
        lora = _lora_gradients(context.lora, found.lora, share, self.layout.experts, traffic)
        gradients = LayerGradients(
            found.hidden_TD.to(inputs.hidden_TD.dtype),
            found.weight_TK.to(context.weight_dtype),
            lora,
        )
        seconds, rows = time.perf_counter() - start, sum(share.rows)
        most = max(share.rows, default=0)
        return gradients, Report(rows, most, seconds, True, traffic, device_rows=rows)

    def _alone(self, call: Call, share: Share, inputs: Inputs) -> Context:
        homes = tuple(Home.of(factor) for factor in inputs.tensors()[3:])
        own = Context(call, inputs.scalings, inputs.weight_TK.dtype, homes, ())
        return _with_share(own, share, inputs, self.layout.experts)


class PartedEngine:
    """Implements ExpertsEngine: another engine packs, and computes what is left for the host."""

    def __init__(
        self,
        inner: CpuEngine | NodeEngines,
        policy_of: PolicyOf,
        kind: type[PartedExperts] = PartedExperts,
    ) -> None:
        self._inner, self._policy_of, self._kind = inner, policy_of, kind

    def __deepcopy__(self, memo: dict[int, Any]) -> PartedEngine:
        return self

    @property
    def isa(self) -> str:
        """See ExpertsEngine; the host's."""
        return self._inner.isa

    @property
    def threads(self) -> int:
        """See ExpertsEngine; the host's."""
        return self._inner.threads

    @property
    def cached_bytes(self) -> int:
        """See ExpertsEngine; of the host."""
        return self._inner.cached_bytes

    @property
    def packer(self) -> Engine:
        """See ExpertsEngine."""
        return self._inner.packer

    @property
    def needs_copies(self) -> bool:
        """See ExpertsEngine."""
        return self._inner.needs_copies

    def trim(self) -> int:
        """See ExpertsEngine."""
        return self._inner.trim()

    def new_experts(self, layout: WeightLayout) -> PartedExperts:
        """See ExpertsEngine."""
        return self._kind(self._inner.new_experts(layout), self._policy_of)

    def on(self, weights: ExpertWeights) -> PartedExperts:
        """See ExpertsEngine."""
        return self._kind(self._inner.on(weights), self._policy_of)


def _left_for_host(staged: Inputs, share: Share, experts: int) -> Inputs:
    """The inputs with the accelerator's choices skipped."""
    places = torch.arange(experts + 1)
    places[list(share.places.on_device)] = experts
    return replace(staged, index_TK=places[staged.index_TK])


def _with_share(context: Context, share: Share, inputs: Inputs, experts: int) -> Context:
    """A context that holds the accelerator's inputs, too, and what it computes."""
    theirs = (*(t.detach() for t in inputs.tensors()), share.encoded(experts))
    return replace(context, tensors=(*context.tensors, *theirs), share_tensors=len(theirs))


def _is_alone(context: Context) -> bool:
    """Whether the host has nothing of a pass."""
    return len(context.tensors) == context.share_tensors > 0


def _parted(context: Context) -> tuple[Context, Inputs, Share]:
    """The host's context, the accelerator's inputs, and its share."""
    cut = len(context.tensors) - context.share_tensors
    *theirs, encoded = context.tensors[cut:]
    own = replace(context, tensors=context.tensors[:cut], share_tensors=0)
    return own, Inputs.of(theirs, context.scalings), Share.decoded(encoded)


def _lora_gradients(
    homes: Sequence[Home],
    found: LoraGradients,
    share: Share,
    experts: int,
    traffic: Traffic,
) -> tuple[Tensor | None, ...]:
    """Those of the accelerator's experts as the factors have them, each where its factor is."""
    flat = [gradient for pair in found for gradient in (pair or (None, None))]
    results: list[Tensor | None] = []
    for home, gradient in zip(homes, flat, strict=True):
        if gradient is None:
            results.append(None)
        elif home.copies < experts:  # what all experts share gets the gradients of all of them
            results.append(gradient.to(home.dtype))
        else:
            index = bring(torch.tensor(share.places.on_device, dtype=torch.int64), gradient.device)
            whole = gradient.new_zeros(experts, *gradient.shape[1:], dtype=home.dtype)
            results.append(whole.index_copy_(0, index, gradient.to(home.dtype)))
    going = [i for i, t in enumerate(results) if t is not None and t.device != homes[i].device]
    if going:
        wanted = [(t, t.dtype) for t in (results[i] for i in going) if t is not None]
        with link_of(wanted[0][0].device).send_down(wanted).wait(traffic) as (arrived,):
            for i, tensor in zip(going, arrived, strict=True):
                results[i] = tensor.to(homes[i].device, copy=True)
    return tuple(results)
