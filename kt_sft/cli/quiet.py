"""Commands whose result is what they print: nothing else goes to their output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def only_results() -> Iterator[None]:
    """What packages print goes to stderr, and of our own log only warnings are shown.

    A plan that is tried with many settings would say the same for each of them.
    """
    ours = logging.getLogger("kt_sft")
    former = ours.level
    ours.setLevel(logging.WARNING)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        ours.setLevel(former)
