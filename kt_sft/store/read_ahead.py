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


class ReadAhead:
    """Brings the layer after the one that is computed into memory, on a thread of its own."""

    def __init__(self, packed: PackedFile) -> None:
        self._packed = packed
        self._paths = [layer.path for layer in packed.layers]
        self._places = {path: i for i, path in enumerate(self._paths)}
        self._wanted: int | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.nbytes = 0  # asked for so far

    def __call__(self, direction: str, path: str) -> None:
        """The forward or backward of a layer begins."""
        self._want(self._places[path] + (1 if direction == "forward" else -1))

    def _want(self, layer: int) -> None:
        if not 0 <= layer < len(self._paths):
            return
        with self._changed:
            self._wanted = layer
            self._changed.notify()
            if self._thread is None:
                # It must not keep this alive, nor the process.
                self._thread = threading.Thread(
                    target=_work, args=(weakref.ref(self), self._changed), daemon=True,
                    name="kt-sft-read-ahead",
                )  # fmt: skip
                self._thread.start()

    def _bring(self, layer: int) -> None:
        for begin, end in self._packed.ranges(self._paths[layer]):
            for step in range(begin, end, _STEP):
                if self._wanted is not None:  # the model is further on
                    return
                self._packed.bring(step, min(end, step + _STEP))
                self.nbytes += min(end, step + _STEP) - step

    def _next(self) -> int | None:
        wanted, self._wanted = self._wanted, None
        return wanted


def _work(owner: weakref.ref[ReadAhead], changed: threading.Condition) -> None:
    while True:
        with changed:
            found = owner()
            if found is None:
                return
            layer = found._next()
            if layer is None:
                del found
                changed.wait(1.0)
                continue
        try:
            found._bring(layer)
        except OSError as error:
            logger.warning("%s: reading ahead failed (%s); it goes on without", owner, error)
            return
        del found
