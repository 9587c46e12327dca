"""SIGTERM and SIGINT during training: the first stops after the step, the second at once.

Schedulers signal every process of a job, and launchers pass on what they get, so that one request
arrives several times: what follows within two seconds belongs to the first one.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_REQUEST_SECONDS = 2.0


class StopSignals:
    """Handlers for as long as a training runs; `received` is the signal, or 0."""

    def __init__(self) -> None:
        self.received = 0
        self._former: dict[int, Any] = {}
        self._first = 0.0

    def install(self) -> None:
        """Only the main thread may; elsewhere signals stay what they were."""
        self.received = 0
        if self._former or threading.current_thread() is not threading.main_thread():
            return
        self._former = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._first < _SAME_REQUEST_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received, self._first = number, time.monotonic()
        name = signal.Signals(number).name
        logger.warning(
            "%s: finishing this step, then saving and stopping; once more stops at once", name
        )


def ignore_termination() -> None:
    """For a process that is about to end; launchers that lose patience send SIGKILL."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
