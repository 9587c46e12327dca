"""Engines that compute in host memory: tensors come there, and results go back.

Legend: T tokens, D hidden size, K top-k, r LoRA rank.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from kt_sft.engines.protocol import Context, Forward, Held, Report
from kt_sft.kernels import BlockReport, Call, Gradients, Inputs, LoraFactors
from kt_sft.kernels.checks import is_finite


def to_host(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous CPU tensor of `dtype`; copied through pinned memory from an accelerator."""
    tensor = tensor.detach().to(dtype=dtype or tensor.dtype).contiguous()
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)


def _staged(inputs: Inputs) -> Inputs:
    """The inputs as the kernels read them."""
    fp32 = torch.float32
    gate, up, down = (
        f and LoraFactors(to_host(f.a, fp32), to_host(f.b, fp32), f.scaling) for f in inputs.lora
    )
    return Inputs(
        to_host(inputs.hidden_TD),
        to_host(inputs.index_TK, torch.int64),
        to_host(inputs.weight_TK, fp32),
        (gate, up, down),
    )


def _context(call: Call, inputs: Inputs, staged: Inputs, kept: tuple[Tensor, ...]) -> Context:
    hidden_TD, _, weight_TK, *lora = inputs.tensors()
    homes = tuple((t.device, t.dtype) for t in (hidden_TD, weight_TK, *lora))
    return Context(call, inputs.scalings, homes, (*staged.tensors(), *kept))


class HostExperts(ABC):
    """The part of PlacedExperts that is the same for every engine on the host."""

    def __deepcopy__(self, memo: dict[int, Any]) -> HostExperts:
        return self

    @abstractmethod
    def _forward(
        self, call: Call, inputs: Inputs, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, ...], BlockReport]:
        """out [T, D], what backward needs, and a report."""

    @abstractmethod
    def _backward(
        self, call: Call, inputs: Inputs, d_out_TD: Tensor, kept: tuple[Tensor, ...]
    ) -> tuple[Gradients, BlockReport]:
        """The gradients of all inputs, LoRA's for every expert."""

    def forward(self, call: Call, inputs: Inputs, keep: bool) -> Forward:
        """See PlacedExperts."""
        staged = _staged(inputs)
        start = time.perf_counter()
        out_TD, kept, report = self._forward(call, staged, keep)
        seconds = time.perf_counter() - start
        return Forward(
            out_TD.to(inputs.hidden_TD.device),
            _context(call, inputs, staged, kept),
            Held(staged.index_TK, out_TD, kept),
            Report(report.rows, report.max_rows, seconds, is_finite(out_TD)),
        )

    def resume(self, call: Call, inputs: Inputs, held: Held) -> Forward | None:
        """See PlacedExperts."""
        staged = _staged(inputs)
        if not torch.equal(held.index_TK, staged.index_TK):
            return None
        return Forward(
            held.out_TD.to(inputs.hidden_TD.device),
            _context(call, inputs, staged, held.kept),
            held,
            Report(0, 0, 0.0, finite=True),
        )

    def backward(self, context: Context, d_out_TD: Tensor) -> tuple[Gradients, Report]:
        """See PlacedExperts."""
        inputs = context.inputs
        host_d_out = to_host(d_out_TD, inputs.hidden_TD.dtype)
        start = time.perf_counter()
        found, report = self._backward(context.call, inputs, host_d_out, context.kept)
        seconds = time.perf_counter() - start
        finite = is_finite(found.hidden_TD)
        homes = iter(context.homes)

        def home(tensor: Tensor) -> Tensor:
            device, dtype = next(homes)
            return tensor.to(device=device, dtype=dtype)

        hidden_TD, weight_TK = home(found.hidden_TD), home(found.weight_TK)
        lora: list[tuple[Tensor, Tensor] | None] = []
        for factors, pair in zip(inputs.lora, found.lora, strict=True):
            if factors is None or pair is None:
                next(homes), next(homes)
                lora.append(None)
            else:
                lora.append((home(_of(factors.a, pair[0])), home(_of(factors.b, pair[1]))))
        gradients = Gradients(hidden_TD, weight_TK, tuple(lora))
        return gradients, Report(report.rows, report.max_rows, seconds, finite)


def _of(factor: Tensor, gradient: Tensor) -> Tensor:
    """What all experts share gets the gradients of all of them."""
    return gradient.sum(0, keepdim=True) if len(factor) < len(gradient) else gradient
