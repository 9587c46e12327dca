"""The places of a layer's experts in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# Streamed experts come in so many pieces, each computed with while the next one comes. With more of
# them the device begins earlier, and is given more work to queue.
STREAM_PIECES = 8


@dataclass(frozen=True)
class Assignment:
    """The experts that an accelerator computes in one pass: those whose weights are there, and
    those whose weights are streamed to it. The host computes the others."""

    resident: tuple[int, ...] = ()
    streamed: tuple[int, ...] = ()

    @property
    def on_device(self) -> tuple[int, ...]:
        """In the order in which they are computed: what is there keeps the device busy first."""
        return self.resident + self.streamed


class Policy(Protocol):
    """What decides the places."""

    def assign(
        self, rows: Sequence[int], resident: Sequence[int], backward_follows: bool
    ) -> Assignment:
        """For a pass in which each expert of a layer gets so many rows; resident: the experts whose
        weights are on the device. Experts without rows are left out. The same for equal arguments.
        """


class HostOnly:
    """Implements Policy: the host computes everything."""

    def assign(
        self, rows: Sequence[int], resident: Sequence[int], backward_follows: bool
    ) -> Assignment:
        """See Policy."""
        return Assignment()


class AllOnDevice:
    """Implements Policy: the host computes nothing."""

    def assign(
        self, rows: Sequence[int], resident: Sequence[int], backward_follows: bool
    ) -> Assignment:
        """See Policy; streamed where they are not resident."""
        there = set(resident)
        busy = [e for e, count in enumerate(rows) if count]
        return Assignment(
            tuple(e for e in busy if e in there), tuple(e for e in busy if e not in there)
        )


class ResidentOnly:
    """Implements Policy: what is on the device is computed there, all else on the host."""

    def assign(
        self, rows: Sequence[int], resident: Sequence[int], backward_follows: bool
    ) -> Assignment:
        """See Policy."""
        return Assignment(tuple(e for e in resident if rows[e]))
