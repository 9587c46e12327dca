"""Between an accelerator and the host: pinned memory that is reused, and streams of its own.

Nothing here waits for a whole device. The host waits for one event, that of the copy it needs; the
device waits, in the order of its streams, for what the host sends. Only what torch offers for every
accelerator is used.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kt_sft.machine.accelerator import current_device_index, set_device_index

# A tensor and the dtype in which it is wanted on the other side.
Wanted = tuple[Tensor, torch.dtype]

# In packed memory every tensor begins at a multiple; the host's vectors read best there.
_ALIGNMENT = 64
# Pinned buffers of each direction: one is filled while the other is read.
BUFFERS = 2


@dataclass
class Traffic:
    """What crossed the link: bytes, and seconds in which one side waited for the other.

    The device waits while the host computes; what else it has to do meanwhile is not known here.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    host_waited: float = 0.0
    device_waited: float = 0.0
    arrived: float = 0.0  # when the host had what it last asked for

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.bytes_down + other.bytes_down,
            self.bytes_up + other.bytes_up,
            self.host_waited + other.host_waited,
            self.device_waited + other.device_waited,
        )


@dataclass(eq=False)
class _Buffer:
    """Pinned bytes; `busy` is the copy that may still read them."""

    memory: Tensor
    busy: torch.Event | None = None


def pinned_size(nbytes: int) -> int:
    """Of a buffer for so many bytes: a power of two, which CUDA's allocator would take anyway."""
    return max(1 << 20, 1 << (nbytes - 1).bit_length())


class _Buffers:
    """The pinned memory of one direction: few buffers, grown to what was asked for."""

    def __init__(self) -> None:
        self._unused: list[_Buffer] = []
        self._made = 0
        self._lock = threading.RLock()  # a collection within it may give a buffer back

    @property
    def nbytes(self) -> int:
        """Of the buffers that are not in use."""
        with self._lock:
            return sum(b.memory.nbytes for b in self._unused)

    def take(self, nbytes: int) -> _Buffer:
        """One that no copy reads any more; waits for the oldest where all are being read."""
        with self._lock:
            by_size = sorted(self._unused, key=lambda b: b.memory.nbytes)
            fitting = [b for b in by_size if b.memory.nbytes >= nbytes]
            idle = [b for b in fitting if b.busy is None or b.busy.query()]
            buffer = idle[0] if idle else None
            if buffer is None and self._made >= BUFFERS:
                # One that is being read is waited for; one that is too small makes room.
                buffer = next(iter(fitting or by_size), None)
            if buffer is not None:
                self._unused.remove(buffer)
            else:
                self._made += 1
        if buffer is not None and buffer.busy is not None:
            if not buffer.busy.query():
                buffer.busy.synchronize()
            buffer.busy = None
        if buffer is None or buffer.memory.nbytes < nbytes:
            with torch.inference_mode(False):  # it outlives the pass that needs it first
                memory = torch.empty(pinned_size(nbytes), dtype=torch.uint8, pin_memory=True)
            buffer = _Buffer(memory)
        return buffer

    def give_back(self, buffer: _Buffer, busy: torch.Event | None = None) -> None:
        """For the next one, once `busy` is over."""
        buffer.busy = busy
        with self._lock:
            self._unused.append(buffer)


def _places(shapes: Sequence[tuple[torch.Size, torch.dtype]]) -> tuple[list[int], int]:
    """Where tensors begin in packed memory, and its bytes."""
    begins, end = [], 0
    for shape, dtype in shapes:
        begins.append(end)
        end += -(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return begins, end


def _views(memory: Tensor, shapes: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """Tensors in packed memory."""
    begins, _ = _places(shapes)
    return [
        memory[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for begin, (shape, dtype) in zip(begins, shapes, strict=True)
    ]


class Landing:
    """Where the host writes a result; `send` brings it up. Views of one copy if there are several.

    tensors: on the host, contents undefined; inside of `with` only.
    """

    def __init__(self, link: Link, shapes: Sequence[tuple[torch.Size, torch.dtype]]) -> None:
        self._link, self._shapes = link, shapes
        _, size = _places(shapes)
        # Alone it is no view: a model may write into what it gets.
        shape, dtype = shapes[0] if len(shapes) == 1 else (torch.Size([size]), torch.uint8)
        self._target = torch.empty(shape, dtype=dtype, device=link.device)
        # The allocator may have given it memory that earlier work of this stream still reads.
        self._free = link.mark()
        # After what may find too little memory.
        self._buffer = link.up.take(size)
        self._bytes = self._buffer.memory[:size]
        self.tensors = _views(self._bytes, shapes)
        self._sent: torch.Event | None = None

    def __enter__(self) -> Landing:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.up.give_back(self._buffer, self._sent)

    def send(self, traffic: Traffic) -> list[Tensor]:
        """The tensors on the device, for the current stream."""
        link, alone = self._link, len(self._shapes) == 1
        source = self.tensors[0] if alone else self._bytes
        link.up_stream.wait_event(self._free)
        with link.on(link.up_stream):
            self._target.copy_(source, non_blocking=True)
            self._sent = link.mark()
        link.current_stream().wait_event(self._sent)
        traffic.bytes_up += source.nbytes
        if traffic.arrived:
            traffic.device_waited += time.perf_counter() - traffic.arrived
            traffic.arrived = 0.0
        return [self._target] if alone else _views(self._target, self._shapes)


class Arrival:
    """Groups of tensors on their way to the host; `wait` for them."""

    def __init__(self, link: Link, groups: Sequence[Sequence[Wanted]]) -> None:
        self._link, self._groups = link, groups
        self._buffers: list[_Buffer] = []
        self._sources: list[Tensor] = []  # device memory that lives until it is read
        self._arrived: torch.Event | None = None
        for group in groups:
            if group:
                self._begin(group)
        with link.on(link.down_stream):
            self._arrived = link.mark()

    def __del__(self) -> None:
        self._release()

    def _begin(self, group: Sequence[Wanted]) -> None:
        link, shapes = self._link, [(t.shape, dtype) for t, dtype in group]
        first, dtype = group[0]
        if len(group) == 1 and first.dtype == dtype and first.is_contiguous():
            source = first.detach().reshape(-1).view(torch.uint8)
        else:
            source = torch.empty(_places(shapes)[1], dtype=torch.uint8, device=link.device)
            for place, (tensor, _) in zip(_views(source, shapes), group, strict=True):
                place.copy_(tensor.detach())
        self._sources.append(source)
        buffer = link.down.take(source.nbytes)
        self._buffers.append(buffer)
        link.down_stream.wait_event(link.mark())
        with link.on(link.down_stream):
            buffer.memory[: source.nbytes].copy_(source, non_blocking=True)

    @contextmanager
    def wait(self, traffic: Traffic) -> Iterator[list[list[Tensor]]]:
        """Each group's tensors in pinned memory; valid inside."""
        assert self._arrived is not None
        start = time.perf_counter()
        self._arrived.synchronize()
        traffic.arrived = time.perf_counter()
        traffic.host_waited += traffic.arrived - start
        traffic.bytes_down += sum(t.nbytes for t in self._sources)
        self._sources.clear()
        buffers, found = iter(self._buffers), []
        for group in self._groups:
            shapes = [(t.shape, dtype) for t, dtype in group]
            found.append(_views(next(buffers).memory, shapes) if group else [])
        try:
            yield found
        finally:
            self._release()

    def _release(self) -> None:
        """Of one that nobody waits for, a copy may still run."""
        while self._buffers:
            self._link.down.give_back(self._buffers.pop(), self._arrived)


class Link:
    """One accelerator's; use `link_of`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.down_stream, self.up_stream = torch.Stream(device), torch.Stream(device)
        self.down, self.up = _Buffers(), _Buffers()

    @property
    def pinned_bytes(self) -> int:
        """Of host memory, between calls."""
        return self.down.nbytes + self.up.nbytes

    def current_stream(self) -> torch.Stream:
        """Of this thread."""
        return torch.accelerator.current_stream(self.device)

    def mark(self) -> torch.Event:
        """An event after all that the current stream has been given."""
        event = torch.Event(self.device)
        event.record(self.current_stream())
        return event

    @contextmanager
    def on(self, stream: torch.Stream) -> Iterator[None]:
        """Work for another stream of this device, which may not be the current one."""
        former, index = self.current_stream(), current_device_index()
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(former)
            set_device_index(index)

    def send_down(self, *groups: Sequence[Wanted]) -> Arrival:
        """Begins to bring tensors to the host, each group by one copy."""
        return Arrival(self, groups)

    def landing(self, *shapes: tuple[torch.Size, torch.dtype]) -> Landing:
        """For results of these shapes."""
        return Landing(self, shapes)


@functools.cache
def link_of(device: torch.device) -> Link:
    """The one of a device."""
    return Link(device)
