"""Gradient checkpointing that computes the experts' forward once.

Checkpointing runs a layer's forward twice: once for its output, once more before its backward. What
the experts computed in the first run is handed to the second one. It lives in a `Checkpoint`, which
belongs to one call of the checkpointed function: autograd holds that function until backward and
drops it with the graph, so that no other pass can take the activations, and a forward without
backward, or one that raises, leaves nothing behind.
"""

from __future__ import annotations

import functools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kt_sft import patches
from kt_sft.engines.protocol import Held

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Computed:
    """A forward of one block of experts.

    key: what the result depends on besides the values of hidden and LoRA, and the routing.
    """

    key: Hashable
    held: Held

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return self.held.nbytes


class KeptActivations:
    """How many bytes the checkpoints of a model hold, and how many they may."""

    def __init__(self, limit: Callable[[], int]) -> None:
        """`limit` is asked once, when the first activations are kept."""
        self.limit_is = limit
        self._limit: int | None = None
        self._warned = False
        self.nbytes = 0
        self.peak = 0

    def admit(self, computed: Computed) -> bool:
        """Counts `computed` until it is collected; False where it is over the limit."""
        if self._limit is None:
            self._limit = self.limit_is()
        size = computed.nbytes
        if self.nbytes + size > self._limit:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the experts' activations have reached their limit, %.1f GB of host memory; "
                    "those of the other layers are recomputed. Fewer tokens in a batch would fit",
                    self._limit / 1e9,
                )
            return False
        self.nbytes += size
        self.peak = max(self.peak, self.nbytes)
        weakref.finalize(computed, self._release, size)
        return True

    def _release(self, size: int) -> None:
        self.nbytes -= size


class Checkpoint:
    """What one call of a checkpointed function keeps for its second run."""

    def __init__(self, keeps: bool) -> None:
        self._keeps = keeps
        self._runs = 0
        self._position = 0
        self._computed: dict[int, Computed] = {}

    @contextmanager
    def run(self) -> Iterator[None]:
        """Around each run of the function, in the thread that runs it."""
        self._runs += 1
        self._position = 0
        outer, _current.checkpoint = current(), self
        try:
            yield
        finally:
            _current.checkpoint = outer

    @property
    def keeps(self) -> bool:
        """Whether this is a first run that a second one will follow."""
        return self._keeps and self._runs == 1

    def next_position(self) -> int:
        """The number of this call of experts within the run."""
        self._position += 1
        return self._position

    def put(self, position: int, computed: Computed) -> None:
        """For the second run."""
        self._computed[position] = computed

    def take(self, position: int) -> Computed | None:
        """From the first run; once, as a third run has nothing to wait for."""
        return self._computed.pop(position, None) if self._runs > 1 else None


class _Current(threading.local):
    checkpoint: Checkpoint | None = None


_current = _Current()


def current() -> Checkpoint | None:
    """The checkpoint whose function runs in this thread."""
    return _current.checkpoint


def _run_in(layer: Any, checkpoint: Checkpoint, run: Callable, *args: Any, **kwargs: Any) -> Any:
    with checkpoint.run():
        return run(*args, **kwargs)


def _keeping(stock: Callable) -> Callable:
    """A checkpointing function that gives each of its calls a Checkpoint."""

    @functools.wraps(stock)
    def checkpointed(run: Callable, *args: Any, **kwargs: Any) -> Any:
        # Reentrant checkpointing turns gradients off for its first run, but not yet here.
        checkpoint = Checkpoint(keeps=torch.is_grad_enabled())
        layer = getattr(run.func if isinstance(run, functools.partial) else run, "__self__", None)
        # LLaMA-Factory looks for the layer behind a partial of a bound method.
        method = (
            functools.partial(_run_in, None) if layer is None else types.MethodType(_run_in, layer)
        )
        return stock(functools.partial(method, checkpoint, run), *args, **kwargs)

    checkpointed.kt_sft_keeps = True  # type: ignore[attr-defined]
    return checkpointed


def keep_activations(model: Any) -> None:
    """Makes gradient checkpointing of a Transformers model keep what its experts compute.

    Where checkpointing is switched on already, too. Any other model is left as it is.
    """
    patches.install_on(model, "checkpointing")
    if isinstance(getattr(model, "_set_gradient_checkpointing", None), types.MethodType):
        _wrap_functions(model)


def keeping(model: Any) -> Callable:
    """A model's `_set_gradient_checkpointing`, which wraps the function that it sets.

    Bound to its model, so that a copy of the model has one of its own.
    """

    @functools.wraps(type(model)._set_gradient_checkpointing)
    def set_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
        type(self)._set_gradient_checkpointing(self, *args, **kwargs)
        _wrap_functions(self)

    return types.MethodType(set_checkpointing, model)


def _wrap_functions(model: nn.Module) -> None:
    for module in model.modules():
        stock = getattr(module, "_gradient_checkpointing_func", None)
        if stock is not None and not hasattr(stock, "kt_sft_keeps"):
            module._gradient_checkpointing_func = _keeping(stock)  # type: ignore[assignment]
