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
from kt_sft.engines.cpu import CpuEngine, CpuExperts
from kt_sft.engines.host import HostExperts, brought, context_of
from kt_sft.engines.link import Arrival, Traffic, link_of
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
from kt_sft.scheduling.assignment import Assignment, Policy

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

    def _part(
        self, rows: Sequence[int], device: torch.device, backward_follows: bool
    ) -> Share | None:
        """What the accelerator computes of a pass; None: nothing."""
        if self.share is None:
            return None
        policy = self._policy_of(self, device)
        places = policy.assign(rows, self.share.resident, backward_follows)
        chosen = places.on_device
        return Share(places, tuple(rows[e] for e in chosen)) if chosen else None

    def _streamed_bytes(self, share: Share, device: torch.device) -> int:
        each = self.share.expert_bytes if self.share is not None and device.type != "cpu" else 0
        return len(share.places.streamed) * each

    def _forward_staged(
        self, call: Call, inputs: Inputs, staged: Inputs, keep: bool, hold: bool, traffic: Traffic
    ) -> Forward:
        rows = rows_by_expert(staged.index_TK, self.layout.experts)
        share = self._part(rows, inputs.hidden_TD.device, keep or hold)
        if share is None or self.share is None:
            return super()._forward_staged(call, inputs, staged, keep, hold, traffic)
        working = self.share.forward(call, share, inputs, keep and not hold)
        try:
            rest = _left_for_host(staged, share, self.layout.experts)
            done = super()._forward_staged(call, inputs, rest, keep, hold, traffic)
        finally:
            wait([working])  # whatever happens: it reads the inputs
        total_TD, kept = working.result()
        # NaN that the accelerator makes is seen by the layer that it reaches.
        finite = done.report.finite and is_finite(staged.hidden_TD)
        traffic.bytes_up += self._streamed_bytes(share, inputs.hidden_TD.device)
        report = replace(
            done.report,
            rows=sum(rows),
            max_rows=max(rows),
            finite=finite,
            expert_rows=rows,
            device_rows=sum(share.rows),
        )
        done = _joined(done._replace(report=report), share, inputs, total_TD, kept)
        if done.held is not None:
            # The model may write into what it gets.
            whole = replace(done.held, index_TK=staged.index_TK.clone(), share=share)
            done = done._replace(held=replace(whole, out_TD=done.out_TD.clone()))
        return done

    def _resume_staged(
        self, call: Call, inputs: Inputs, staged: Inputs, held: Held, traffic: Traffic
    ) -> Forward | None:
        share = held.share
        if share is None:
            return super()._resume_staged(call, inputs, staged, held, traffic)
        if not torch.equal(held.index_TK, staged.index_TK):
            return None
        rest = _left_for_host(staged, share, self.layout.experts)
        context = _with_share(context_of(call, inputs, rest, held.kept), share, inputs, ())
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
        share = context.share
        if share is None or self.share is None:
            return super().backward(context, d_out_TD, arriving, lora_may_wait)
        own, inputs, kept = _parted(context)
        working = self.share.backward(context.call, share, inputs, d_out_TD, kept)
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
    each of them gets."""

    def send(self, inputs: Inputs) -> Arrival | None:
        """See PlacedExperts."""
        device = inputs.hidden_TD.device
        if device.type == "cpu":
            return None
        return link_of(device).send_down([(inputs.index_TK, torch.int64)])

    def send_gradient(self, context: Context, d_out_TD: Tensor) -> Arrival | None:
        """See PlacedExperts; it is there already."""
        return None

    def forward(
        self, call: Call, inputs: Inputs, arriving: Arrival | None, keep: bool, hold: bool = False
    ) -> Forward:
        """See PlacedExperts."""
        assert self.share is not None
        start, traffic, device = time.perf_counter(), Traffic(), inputs.hidden_TD.device
        with brought(arriving, [[(inputs.index_TK, torch.int64)]], traffic) as ((index_TK,),):
            rows = rows_by_expert(index_TK, self.layout.experts)
            index_TK = index_TK.clone()
        share = self._part(rows, device, keep or hold) or Share(Assignment(), ())
        total_TD, kept = self.share.forward(call, share, inputs, keep and not hold).result()
        traffic.bytes_up += self._streamed_bytes(share, device)
        out_TD = total_TD.to(inputs.hidden_TD.dtype)
        # Elsewhere the host would have to wait.
        finite = device.type != "cpu" or is_finite(out_TD)
        seconds = time.perf_counter() - start
        report = Report(sum(rows), max(rows), seconds, finite, traffic, rows, sum(rows))
        context = _on_device_alone(call, share, inputs, kept) if keep else None
        held = Held(index_TK, out_TD.clone(), (), share) if hold else None
        return Forward(out_TD, context, held, report)

    def resume(
        self, call: Call, inputs: Inputs, arriving: Arrival | None, held: Held
    ) -> Forward | None:
        """See PlacedExperts."""
        traffic = Traffic()
        assert held.share is not None
        with brought(arriving, [[(inputs.index_TK, torch.int64)]], traffic) as ((index_TK,),):
            if not torch.equal(held.index_TK, index_TK):
                return None
        context = _on_device_alone(call, held.share, inputs, ())
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
        assert self.share is not None and context.share is not None
        start, traffic, share = time.perf_counter(), Traffic(), context.share
        _, inputs, kept = _parted(context)
        found = self.share.backward(context.call, share, inputs, d_out_TD, kept).result()
        traffic.bytes_up += self._streamed_bytes(share, d_out_TD.device)
        d_hidden_TD = found.hidden_TD.to(inputs.hidden_TD.dtype)
        lora = _lora_gradients(context.lora, found.lora, share, self.layout.experts, traffic)
        gradients = LayerGradients(d_hidden_TD, found.weight_TK.to(context.weight_dtype), lora)
        finite = d_hidden_TD.device.type != "cpu" or is_finite(d_hidden_TD)
        seconds, rows = time.perf_counter() - start, sum(share.rows)
        most = max(share.rows, default=0)
        return gradients, Report(rows, most, seconds, finite, traffic, device_rows=rows)


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


def _with_share(
    context: Context, share: Share, inputs: Inputs, kept: tuple[Tensor, ...]
) -> Context:
    """A context that holds the accelerator's tensors, too."""
    theirs = (*(t.detach() for t in inputs.tensors()), *kept)
    tensors = (*context.tensors, *theirs)
    return replace(context, tensors=tensors, share=share, share_tensors=len(theirs))


def _on_device_alone(call: Call, share: Share, inputs: Inputs, kept: tuple[Tensor, ...]) -> Context:
    homes = tuple(Home.of(factor) for factor in inputs.tensors()[3:])
    own = Context(call, inputs.scalings, inputs.weight_TK.dtype, homes, ())
    return _with_share(own, share, inputs, kept)


def _parted(context: Context) -> tuple[Context, Inputs, tuple[Tensor, ...]]:
    """The host's context, and the accelerator's inputs and what it kept."""
    cut = len(context.tensors) - context.share_tensors
    theirs = context.tensors[cut:]
    own = replace(context, tensors=context.tensors[:cut], share=None, share_tensors=0)
    inputs = Inputs.of(theirs[: Inputs.NUMBER], context.scalings)
    return own, inputs, theirs[Inputs.NUMBER :]


def _joined(
    host: Forward, share: Share, inputs: Inputs, total_TD: Tensor, kept: tuple[Tensor, ...]
) -> Forward:
    out_TD = (host.out_TD.float() + total_TD).to(host.out_TD.dtype)
    context = host.context and _with_share(host.context, share, inputs, kept)
    return host._replace(out_TD=out_TD, context=context)


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
            results.append(gradient.sum(0, keepdim=True).to(home.dtype))
        else:
            index = torch.tensor(share.places.on_device, dtype=torch.int64)
            index = index.to(gradient.device, non_blocking=True)
            whole = gradient.new_zeros(experts, *gradient.shape[1:], dtype=home.dtype)
            results.append(whole.index_copy_(0, index, gradient.to(home.dtype)))
    going = [i for i, t in enumerate(results) if t is not None and t.device != homes[i].device]
    if going:
        wanted = [(t, t.dtype) for t in (results[i] for i in going) if t is not None]
        with link_of(wanted[0][0].device).send_down(wanted).wait(traffic) as (arrived,):
            for i, tensor in zip(going, arrived, strict=True):
                results[i] = tensor.to(homes[i].device, copy=True)
    return tuple(results)
