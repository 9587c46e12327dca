"""Progress of what takes a while: a bar in a terminal, now and then a line in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

# Seconds until the first line, and between lines.
_FIRST, _BETWEEN = 5.0, 15.0
_GB = 1e9


class Progress:
    """`with Progress("Packing experts", total) as progress: progress.update(done)`.

    unit: "B" for bytes, which are shown in GB and GB/s, or what is counted.
    """

    def __init__(
        self, what: str, total: int, unit: str = "B", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._unit, self._clock = what, total, unit, clock
        self._bar: Any = None
        self._done, self._start, self._next = 0, 0.0, 0.0

    def __enter__(self) -> Progress:
        self._start = self._clock()
        self._next = self._start + _FIRST
        if sys.stderr.isatty():
            scaled = self._unit == "B"
            self._bar = tqdm(total=self._total, desc=self._what, unit=self._unit, unit_scale=scaled)
        return self

    def update(self, done: int) -> None:
        """So much more."""
        self._done += done
        if self._bar is not None:
            self._bar.update(done)
            return
        now = self._clock()
        if now >= self._next and self._done < self._total:
            self._next = now + _BETWEEN
            left = (now - self._start) * (self._total - self._done) / max(1, self._done)
            logger.info("%s: %s, %.0f s left", self._what, self._said(now), left)

    def _said(self, now: float) -> str:
        seconds = max(1e-9, now - self._start)
        if self._unit != "B":
            return f"{self._done:,} of {self._total:,} {self._unit}s"
        done, total = self._done / _GB, self._total / _GB
        return f"{done:.1f} of {total:.1f} GB, {done / seconds:.2f} GB/s"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._clock() - self._start >= _FIRST:
            now = self._clock()
            logger.info("%s: %s in %.0f s", self._what, self._said(now), now - self._start)
