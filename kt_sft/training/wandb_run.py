"""Weights & Biases: additions to a run that the Trainer's own callback has started.

Without such a run every function does nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# The share over the mean that is the darkest, and pixels of an expert.
_DARKEST, _PIXELS = 4.0, 6


def _run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


@contextmanager
def _not_fatal(what: str) -> Iterator[None]:
    """Of a service that is not reached, or a missing package: the training matters more."""
    try:
        yield
    except Exception as error:
        logger.warning("wandb: %s was not sent: %s", what, error)


def update_config(values: Callable[[], dict[str, Any]]) -> None:
    """Adds to the configuration of the current run what is looked up for it."""
    run = _run()
    if run is not None:
        with _not_fatal("the configuration"):
            run.config.update(values(), allow_val_change=True)


def log_page(name: str, page: str) -> None:
    """Adds an HTML page."""
    run = _run()
    if run is not None:
        with _not_fatal(name):
            run.log({name: sys.modules["wandb"].Html(page, inject=False)})


def log_heatmap(name: str, shares: Sequence[Sequence[float]]) -> None:
    """Adds an image: layers by experts, the darker the more of its layer's rows one got."""
    run = _run()
    if run is None or not shares:
        return
    width = max(map(len, shares))
    over = np.zeros((len(shares), width))
    for row, values in zip(over, shares, strict=True):
        row[: len(values)] = np.asarray(values) * len(values)
    grey = 255 - np.clip(over / _DARKEST, 0, 1) * 255
    image = np.kron(grey, np.ones((_PIXELS, _PIXELS))).astype(np.uint8)
    with _not_fatal(name):
        run.log({name: sys.modules["wandb"].Image(image, caption="layers by experts")})


def alert(title: str, text: str) -> None:
    """Tells the person who owns the run, by the way that they have chosen."""
    run = _run()
    if run is not None:
        with _not_fatal(f"the alert {title!r}"):
            run.alert(title=title, text=text)
