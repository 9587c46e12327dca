"""Engines that compute in host memory: tensors come there, and results go back.

Legend: T tokens, D hidden size, K top-k, r LoRA rank.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kt_sft.engines.link import Arrival, Landing, Traffic, Wanted, link_of
from kt_sft.engines.mirror import Mirror
from kt_sft.engines.protocol import Context, Forward, Held, Home, LayerGradients, Report
from kt_sft.kernels import BlockReport, Call, Inputs, WeightLayout, rows_by_expert
from kt_sft.kernels.checks import is_finite

# Of gate, up and down, for every expert: of a [E, r, in] and b [E, out, r], fp32.
LoraGradients = tuple[tuple[Tensor, Tensor] | None, ...]


class _Here:
    """A Landing of what is computed where it is wanted."""

    def __init__(self, *shapes: tuple[torch.Size, torch.dtype]) -> None:
        self.tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def send(self, traffic: Traffic) -> list[Tensor]:
        return self.tensors


def _landing(device: torch.device, *shapes: tuple[torch.Size, torch.dtype]) -> _Here | Landing:
    return _Here(*shapes) if device.type == "cpu" else link_of(device).landing(*shapes)


@contextmanager
def brought(
    arriving: Arrival | None, groups: Sequence[Sequence[Wanted]], traffic: Traffic
) -> Iterator[list[list[Tensor]]]:
    """The groups' tensors on the host, contiguous; those that arrive are valid inside only."""
    if arriving is not None:
        with arriving.wait(traffic) as found:
            yield found
    else:
        host = torch.device("cpu")
        yield [[t.detach().to(host, dtype).contiguous() for t, dtype in group] for group in groups]


class HostExperts(ABC):
    """The part of PlacedExperts that is the same for every engine on the host."""

    def __init__(self) -> None:
        self._mirror = Mirror()

    def __deepcopy__(self, memo: dict[int, Any]) -> HostExperts:
        return self

    @property
    @abstractmethod
    def layout(self) -> WeightLayout:
        """See PlacedExperts."""

    @abstractmethod
    def _forward(
        self, call: Call, inputs: Inputs, keep: bool, out_TD: Tensor
    ) -> tuple[tuple[Tensor, ...], BlockReport]:
        """Writes out [T, D]; returns what backward needs, and a report."""

    @abstractmethod
    def _backward(
        self,
        call: Call,
        inputs: Inputs,
        d_out_TD: Tensor,
        kept: tuple[Tensor, ...],
        into: tuple[Tensor, Tensor],
    ) -> tuple[LoraGradients, BlockReport]:
        """Writes the gradients of hidden and weight `into` tensors; returns those of LoRA."""

    def _wanted(
        self, inputs: Inputs
    ) -> tuple[list[Tensor | None], tuple[list[Wanted], list[Wanted]]]:
        """LoRA that is on the host; what has changed of it, and the other tensors: one wait."""
        hidden_TD, index_TK, weight_TK, *lora = inputs.tensors()
        copies = [self._on_host(factor) for factor in lora]
        missing = [(f, f.dtype) for f, copy in zip(lora, copies, strict=True) if copy is None]
        return copies, (missing, [
            (hidden_TD, hidden_TD.dtype), (index_TK, torch.int64), (weight_TK, torch.float32)
        ])  # fmt: skip

    def send(self, inputs: Inputs) -> Arrival | None:
        """See PlacedExperts."""
        device = inputs.hidden_TD.device
        if device.type == "cpu":
            return None
        _, groups = self._wanted(inputs)
        return link_of(device).send_down(*groups)

    def send_gradient(self, context: Context, d_out_TD: Tensor) -> Arrival | None:
        """See PlacedExperts."""
        device = d_out_TD.device
        if device.type == "cpu":
            return None
        return link_of(device).send_down([(d_out_TD, context.inputs.hidden_TD.dtype)])

    @contextmanager
    def _inputs(
        self, inputs: Inputs, arriving: Arrival | None, traffic: Traffic
    ) -> Iterator[Inputs]:
        """The inputs as the kernels read them; valid inside only."""
        copies, groups = self._wanted(inputs)
        with brought(arriving, groups, traffic) as (new, rest):
            fetched = (self._mirror.keep(f, t) for (f, _), t in zip(groups[0], new, strict=True))
            factors = [next(fetched) if copy is None else copy for copy in copies]
            yield Inputs.of((*rest, *factors), inputs.scalings)

    def _on_host(self, factor: Tensor) -> Tensor | None:
        """A LoRA factor as the kernels read it; None where it is to be fetched."""
        if factor.numel() == 0:
            return torch.empty(0)
        if factor.device.type == "cpu" and factor.dtype == torch.float32:
            return factor.detach().contiguous()
        copy = self._mirror.copy_of(factor)
        if copy is None and factor.device.type == "cpu":
            return self._mirror.keep(factor, factor.detach())
        return copy

    def forward(
        self, call: Call, inputs: Inputs, arriving: Arrival | None, keep: bool, hold: bool = False
    ) -> Forward:
        """See PlacedExperts."""
        traffic = Traffic()
        with self._inputs(inputs, arriving, traffic) as staged:
            rows = rows_by_expert(staged.index_TK, self.layout.experts)
            return self._forward_staged(call, inputs, staged, rows, keep, hold, traffic)

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
        """From the inputs on the host; out goes to where `inputs` are.

        rows: of all experts of the layer, of those that are left out here, too.
        """
        hidden_TD = inputs.hidden_TD
        with _landing(hidden_TD.device, (hidden_TD.shape, hidden_TD.dtype)) as landing:
            (host_out_TD,) = landing.tensors
            start = time.perf_counter()
            kept, report = self._forward(call, staged, keep or hold, host_out_TD)
            seconds = time.perf_counter() - start
            (out_TD,) = landing.send(traffic)
            finite = is_finite(host_out_TD)
            held = None
            if hold:
                # The model may write into what it gets, and the link into its memory.
                held = Held(staged.index_TK.clone(), host_out_TD.clone(), kept)
            context = context_of(call, inputs, staged, kept) if keep else None
        done = Report(report.rows, report.max_rows, seconds, finite, traffic, rows)
        return Forward(out_TD, context, held, done)

    def resume(
        self, call: Call, inputs: Inputs, arriving: Arrival | None, held: Held
    ) -> Forward | None:
        """See PlacedExperts."""
        traffic = Traffic()
        with self._inputs(inputs, arriving, traffic) as staged:
            return self._resume_staged(call, inputs, staged, held, traffic)

    def _resume_staged(
        self, call: Call, inputs: Inputs, staged: Inputs, held: Held, traffic: Traffic
    ) -> Forward | None:
        if not torch.equal(held.index_TK, staged.index_TK):
            return None
        form = held.out_TD.shape, held.out_TD.dtype
        with _landing(inputs.hidden_TD.device, form) as landing:
            landing.tensors[0].copy_(held.out_TD)
            (out_TD,) = landing.send(traffic)
        context = context_of(call, inputs, staged, held.kept)
        return Forward(out_TD, context, held, Report(0, 0, 0.0, finite=True, traffic=traffic))

    def backward(
        self,
        context: Context,
        d_out_TD: Tensor,
        arriving: Arrival | None,
        lora_may_wait: bool = False,
    ) -> tuple[LayerGradients, Report]:
        """See PlacedExperts."""
        inputs, device, traffic = context.inputs, d_out_TD.device, Traffic()
        hidden_TD, weight_TK = inputs.hidden_TD, inputs.weight_TK
        forms = (hidden_TD.shape, hidden_TD.dtype), (weight_TK.shape, weight_TK.dtype)
        with (
            brought(arriving, [[(d_out_TD, hidden_TD.dtype)]], traffic) as ((host_d_out_TD,),),
            _landing(device, *forms) as landing,
        ):
            into = landing.tensors[0], landing.tensors[1]
            start = time.perf_counter()
            found, report = self._backward(context.call, inputs, host_d_out_TD, context.kept, into)
            seconds = time.perf_counter() - start
            d_hidden_TD, d_weight_TK = landing.send(traffic)
            finite = is_finite(into[0])
        lora = self._lora_gradients(context, found, lora_may_wait, traffic)
        gradients = LayerGradients(d_hidden_TD, d_weight_TK.to(context.weight_dtype), lora)
        return gradients, Report(report.rows, report.max_rows, seconds, finite, traffic)

    def _lora_gradients(
        self,
        context: Context,
        found: LoraGradients,
        may_wait: bool,
        traffic: Traffic,
    ) -> tuple[Tensor | None, ...]:
        """Each where its factor is; None for those that wait here."""
        flat = [gradient for pair in found for gradient in (pair or (None, None))]
        results: list[Tensor | None] = [None] * len(flat)
        going: dict[torch.device, list[int]] = {}
        for i, (home, gradient) in enumerate(zip(context.lora, flat, strict=True)):
            if gradient is None:
                continue
            # What all experts share gets the gradients of all of them.
            shared = home.copies < len(gradient)
            total = gradient.sum(0, keepdim=True) if shared else gradient
            if home.device.type == "cpu":
                results[i] = total.to(home.dtype)
            elif home.parameter is not None and may_wait:
                self._mirror.hold(home.parameter, total)
            else:
                going.setdefault(home.device, []).append(i)
                results[i] = (
                    total.to(home.dtype)
                    if home.parameter is None
                    else self._mirror.with_held(home.parameter, total)
                )
        for device, places in going.items():
            sums = [t for t in (results[i] for i in places) if t is not None]
            with _landing(device, *((t.shape, t.dtype) for t in sums)) as landing:
                for place, gradient in zip(landing.tensors, sums, strict=True):
                    place.copy_(gradient)
                for i, sent in zip(places, landing.send(traffic), strict=True):
                    results[i] = sent
        return tuple(results)

    def forget_lora(self) -> None:
        """See PlacedExperts."""
        self._mirror.forget_copies()

    def forget_gradients(self) -> None:
        """See PlacedExperts."""
        self._mirror.forget_held()


def context_of(call: Call, inputs: Inputs, staged: Inputs, kept: tuple[Tensor, ...]) -> Context:
    """What a forward leaves whose inputs are `staged` on the host."""
    hidden_TD, index_TK, weight_TK, *lora = staged.tensors()
    if inputs.hidden_TD.device.type != "cpu":  # the link's memory is for the next layer
        hidden_TD, index_TK, weight_TK = hidden_TD.clone(), index_TK.clone(), weight_TK.clone()
    tensors = (hidden_TD, index_TK, weight_TK, *lora, *kept)
    homes = tuple(Home.of(factor) for factor in inputs.tensors()[3:])
    return Context(call, inputs.scalings, inputs.weight_TK.dtype, homes, tensors)
