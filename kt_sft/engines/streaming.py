"""Packed experts on their way from host memory to a device, a few at a time.

Two buffers: while the experts of one are computed with, those of the other arrive. The host's
thread that asks for them copies them into pinned memory; nothing waits for a whole device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kt_sft.device.packed import PackedPiece, expert_bytes
from kt_sft.engines.link import Link, link_of, pinned_size
from kt_sft.kernels import WeightLayout

_BUFFERS = 2
_ALIGNMENT = 64


@dataclass(eq=False)
class _Buffer:
    """Pinned bytes and their place on the device.

    copied: the copy that may still read the one; used: the work that may still read the other.
    """

    pinned: Tensor
    there: Tensor
    copied: torch.Event | None = None
    used: torch.Event | None = None


class Stream:
    """The way of packed experts to one device; used by one thread at a time. See `stream_of`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._stream = torch.Stream(link.device)
        self._buffers: list[_Buffer] = []
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Of each: pinned memory, and memory of the device."""
        return sum(buffer.pinned.nbytes for buffer in self._buffers)

    def pieces(
        self, source: PackedPiece, experts: Sequence[int], at_a_time: int
    ) -> Iterator[PackedPiece]:
        """`experts` of a layer on the host, on the device for the current stream. Each piece is
        valid until the next one is asked for."""
        for begin in range(0, len(experts), at_a_time):
            chosen = experts[begin : begin + at_a_time]
            buffer = self._take(_size(source.layout, at_a_time))
            _gather(source, chosen, buffer.pinned)
            size = _size(source.layout, len(chosen))
            if buffer.used is not None:
                self._stream.wait_event(buffer.used)
            with self._link.on(self._stream):
                buffer.there[:size].copy_(buffer.pinned[:size], non_blocking=True)
                buffer.copied = self._link.mark()
            self._link.current_stream().wait_event(buffer.copied)
            try:
                yield _views(source.layout, buffer.there, len(chosen))
            finally:  # what was queued before an error, too
                buffer.used = self._link.mark()

    def _take(self, nbytes: int) -> _Buffer:
        """The one whose copy is older, large enough."""
        if not self._buffers or self._buffers[0].pinned.nbytes < nbytes:
            for buffer in self._buffers:
                self._settle(buffer)
            self._buffers = [self._new(nbytes) for _ in range(_BUFFERS)]
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % _BUFFERS
        if buffer.copied is not None:
            buffer.copied.synchronize()
        return buffer

    def _new(self, nbytes: int) -> _Buffer:
        size = pinned_size(nbytes)
        with torch.inference_mode(False):  # they outlive the pass that needs them first
            pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            with self._link.on(self._stream):  # whose memory it is when it is freed
                there = torch.empty(size, dtype=torch.uint8, device=self._link.device)
        return _Buffer(pinned, there)

    def _settle(self, buffer: _Buffer) -> None:
        """Nothing reads it any more, in the order of its stream."""
        if buffer.copied is not None:
            buffer.copied.synchronize()
        if buffer.used is not None:
            self._stream.wait_event(buffer.used)


def _sections(layout: WeightLayout, experts: int) -> Iterator[tuple[str, int, int, int]]:
    """Name, bytes of an expert, begin and end of every section in a buffer."""
    begin = 0
    for name, size in expert_bytes(layout).items():
        end = begin + size * experts
        yield name, size, begin, end
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT


def _size(layout: WeightLayout, experts: int) -> int:
    return max(end for _, _, _, end in _sections(layout, experts))


def _gather(source: PackedPiece, experts: Sequence[int], memory: Tensor) -> None:
    for name, size, begin, end in _sections(source.layout, len(experts)):
        rows = memory[begin:end].view(len(experts), size)
        for row, expert in zip(rows, experts, strict=True):
            row.copy_(source.sections[name][expert])


def _views(layout: WeightLayout, memory: Tensor, experts: int) -> PackedPiece:
    return PackedPiece(
        layout,
        {
            name: memory[begin:end].view(experts, size)
            for name, size, begin, end in _sections(layout, experts)
        },
    )


def stream_bytes(layout: WeightLayout, at_a_time: int) -> int:
    """Of the buffers for so many experts at a time: as much pinned memory as device memory."""
    return _BUFFERS * pinned_size(_size(layout, at_a_time))


@functools.cache
def stream_of(device: torch.device) -> Stream:
    """The one of an accelerator."""
    return Stream(link_of(device))
