"""What an accelerator computes of a layer, while the host computes the rest.

Legend: T tokens, D hidden size, K top-k, E experts, r LoRA rank.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kt_sft.device.block import (
    WORKING_BYTES,
    DeviceBlock,
    Gradients,
    Limits,
    compute_dtype,
)
from kt_sft.device.packed import PackedPiece
from kt_sft.engines.link import link_of
from kt_sft.engines.protocol import Share
from kt_sft.engines.streaming import stream_bytes, stream_of
from kt_sft.kernels import Call, ExpertWeights, Inputs, WeightLayout
from kt_sft.machine.accelerator import set_device_index
from kt_sft.scheduling.assignment import STREAM_PIECES, Assignment

T = TypeVar("T")

# A copy of so many bytes is about as fast as the link can be.
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class DeviceBytes:
    """What a layer's share takes at most, with all of its experts on the accelerator.

    working: of the accelerator, within a pass. pinned: of the host, for streaming.
    """

    working: int
    pinned: int


def device_bytes(layout: WeightLayout, tokens: int, top_k: int, dtype: torch.dtype) -> DeviceBytes:
    """Of a pass with so many tokens through a layer of this form."""
    product = compute_dtype(dtype)
    limits = Limits.within(layout, product)
    buffers = stream_bytes(layout, limits.experts)
    sums = 2 * 4 * tokens * layout.hidden
    routing = 4 * 8 * tokens * top_k
    return DeviceBytes(WORKING_BYTES + buffers + sums + routing, buffers)


class DeviceShare:
    """The experts of one layer as an accelerator computes them: resident ones, and any others of
    `weights` on the host, streamed."""

    def __init__(self, weights: ExpertWeights) -> None:
        self._host = PackedPiece.of(weights)
        self.weights = weights
        self._resident: tuple[int, ...] = ()
        self._there: dict[torch.device, PackedPiece] = {}

    @property
    def resident(self) -> tuple[int, ...]:
        """The experts that are in the device's memory, from the first pass there on."""
        return self._resident

    def place(self, experts: Sequence[int]) -> None:
        """Makes these experts resident instead of others."""
        chosen = tuple(sorted(experts))
        if chosen != self._resident:
            self._resident, self._there = chosen, {}

    @property
    def expert_bytes(self) -> int:
        """Of the packed weights of one expert."""
        return self.weights.nbytes // self.weights.experts

    def stream(self, experts: Sequence[int], device: torch.device, at_a_time: int) -> int:
        """Brings experts to an accelerator for nothing; returns their number. For measurements."""
        return sum(len(p) for p in stream_of(device).pieces(self._host, experts, at_a_time))

    def _on(self, device: torch.device) -> PackedPiece:
        if device not in self._there:
            # They outlive the pass that needs them first.
            with torch.inference_mode(False), torch.no_grad():
                chosen = self._host.take(self._resident)
                self._there[device] = chosen if device.type == "cpu" else chosen.to(device)
        return self._there[device]

    def _pieces(
        self, places: Assignment, device: torch.device, limits: Limits
    ) -> Iterator[tuple[int, PackedPiece]]:
        """See DeviceBlock."""
        at_a_time = limits.experts
        if not set(places.resident) <= set(self._resident):
            # Others have taken their places since the forward: all come from the host.
            places = Assignment((), places.on_device)
        if places.resident:
            there = self._on(device)
            index = [self._resident.index(e) for e in places.resident]
            for begin in range(0, len(index), at_a_time):
                yield begin, there.take(index[begin : begin + at_a_time])
        if not places.streamed:
            return
        first, streamed = len(places.resident), places.streamed
        at_a_time = self.streamed_at_a_time(len(streamed), limits)
        if device.type == "cpu":
            for begin in range(0, len(streamed), at_a_time):
                yield first + begin, self._host.take(streamed[begin : begin + at_a_time])
            return
        pieces = stream_of(device).pieces(self._host, streamed, at_a_time)
        for begin, piece in zip(range(0, len(streamed), at_a_time), pieces, strict=True):
            yield first + begin, piece

    def streamed_at_a_time(self, experts: int, limits: Limits) -> int:
        """Several, as small copies are slow, and few, so that computing begins early."""
        large_enough = -(-_PIECE_BYTES // self.expert_bytes)
        return min(limits.experts, experts, max(large_enough, -(-experts // STREAM_PIECES)))

    def _block(self, call: Call, share: Share, inputs: Inputs) -> DeviceBlock:
        limits = Limits.within(self._host.layout, compute_dtype(inputs.hidden_TD.dtype))
        order = share.places.on_device
        return DeviceBlock(self._host.layout, call, inputs, order, share.rows, limits)

    def forward(self, call: Call, share: Share, inputs: Inputs) -> Future[Tensor]:
        """Its part of out, fp32 [T, D]. Inputs are those of the whole layer, where the model has
        them."""
        block, device = self._block(call, share, inputs), inputs.hidden_TD.device

        def work() -> Tensor:
            return block.forward(self._pieces(share.places, device, block.limits))

        return aside(device, work)

    def backward(
        self, call: Call, share: Share, inputs: Inputs, d_out_TD: Tensor
    ) -> Future[Gradients]:
        """Its part of the gradients; see DeviceBlock."""
        block, device = self._block(call, share, inputs), inputs.hidden_TD.device

        def work() -> Gradients:
            return block.backward(self._pieces(share.places, device, block.limits), d_out_TD)

        return aside(device, work)


@functools.cache
def _thread_of(device: torch.device, _: int) -> ThreadPoolExecutor:
    """That gives a device its work while others wait for the host; each process has its own."""
    name = f"kt-sft-{device.type}"
    if device.type == "cpu":
        return ThreadPoolExecutor(1, name)
    # A thread that begins with another device would make a context there.
    return ThreadPoolExecutor(1, name, initializer=set_device_index, initargs=(device.index,))


def aside(device: torch.device, work: Callable[[], T]) -> Future[T]:
    """`work` on the device's own thread, on the stream that is current here, without gradients."""
    inference = torch.is_inference_mode_enabled()
    accelerator = device.type != "cpu"
    link = link_of(device) if accelerator else None
    stream: Any = link.current_stream() if link is not None else None

    def run() -> T:
        on = link.on(stream) if link is not None else nullcontext()
        # Autocast is the thread's own, and off here.
        with torch.inference_mode(inference), torch.no_grad(), on:
            return work()

    return _thread_of(device, os.getpid()).submit(run)
