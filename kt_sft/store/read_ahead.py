"""Experts that come from the disk while others are computed, where memory cannot hold them all.

The mapped file is the memory: the system drops pages that were not used for long. Layers are used
up the model and then down again, so that the last ones are still there when backward begins; what
is left to do is to ask for the next layer before it is needed.
"""

from __future__ import annotations

import logging
import threading
import weakref

from kt_sft.store.packed_file import PackedFile

logger = logging.getLogger(__name__)

# Read at a time; between such steps a newer wish is noticed.
_STEP = 8 << 20
# Asked for at a time: the second one keeps the disk busy while layers take different times.
_LAYERS = 2


class ReadAhead:
    """Brings the layers after the one that is computed into memory, on a thread of its own."""

    def __init__(self, packed: PackedFile) -> None:
        self._packed = packed
        self._paths = [layer.path for layer in packed.layers]
        self._places = {path: i for i, path in enumerate(self._paths)}
        self._last: tuple[str, int] | None = None
        self._wanted: list[int] | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.nbytes = 0  # asked for so far

    def __call__(self, direction: str, path: str) -> None:
        """The forward or backward of a layer begins."""
        place = self._places[path]
        # A forward for the second time, or below a backward, is that of a checkpointed layer: its
        # backward comes next.
        down = direction == "backward" or self._last in (
            ("forward", place),
            ("backward", place + 1),
        )
        self._last = direction, place
        step = -1 if down else 1
        self._want([place + step * n for n in range(1, _LAYERS + 1)])

    def _want(self, places: list[int]) -> None:
        places = [place for place in places if 0 <= place < len(self._paths)]
        if not places:
            return
        with self._changed:
            self._wanted = places
            self._changed.notify()
            if self._thread is None:
                # It must not keep this alive, nor the process.
                self._thread = threading.Thread(
                    target=_work,
                    args=(weakref.ref(self), self._changed),
                    daemon=True,
                    name="kt-sft-read-ahead",
                )
                self._thread.start()

    def _bring(self, places: list[int]) -> None:
        for place in places:
            for begin, end in self._packed.ranges(self._paths[place]):
                for step in range(begin, end, _STEP):
                    if self._wanted is not None:  # the model is further on
                        return
                    self._packed.bring(step, min(end, step + _STEP))
                    self.nbytes += min(end, step + _STEP) - step

    def _next(self) -> list[int] | None:
        wanted, self._wanted = self._wanted, None
        return wanted


def _work(owner: weakref.ref[ReadAhead], changed: threading.Condition) -> None:
    while True:
        with changed:
            found = owner()
            if found is None:
                return
            places = found._next()
            if places is None:
                del found
                changed.wait(1.0)
                continue
        try:
            found._bring(places)
        except OSError as error:
            logger.warning("reading ahead failed (%s); it goes on without", error)
            return
        del found
