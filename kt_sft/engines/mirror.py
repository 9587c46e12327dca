"""LoRA parameters that live elsewhere, as the host computes with them; and their gradients.

A parameter is copied when it has changed, not whenever it is used. It has changed when its version
counter or its memory has, when any optimizer has stepped (DeepSpeed writes into `.data`, which
counts no version), and when the model goes from training to evaluation or back (so do averages of
weights that are swapped in and out).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary


@dataclass
class _Mirrored:
    """A parameter's copy, and the sum of gradients that it is yet to get.

    state: what the copy was made of. waiting: in the parameter's dtype.
    """

    state: tuple | None = None
    copy: Tensor | None = None
    waiting: Tensor | None = None


@dataclass
class _Steps:
    """How many steps all optimizers of this process have taken."""

    taken: int = 0


@functools.cache
def _steps() -> _Steps:
    steps = _Steps()

    def count(*_: object) -> None:
        steps.taken += 1

    register_optimizer_step_post_hook(count)
    return steps


def _is_mirrored(tensor: Tensor) -> bool:
    # What is made in inference mode counts no versions.
    return isinstance(tensor, nn.Parameter) and not tensor.is_inference()


class Mirror:
    """The mirrored parameters of a layer, by identity; they are not kept alive."""

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()

    def _of(self, parameter: Tensor) -> _Mirrored:
        return self._known.setdefault(parameter, _Mirrored())

    @staticmethod
    def _state(parameter: Tensor) -> tuple:
        place = parameter.device, parameter.dtype, parameter.data_ptr(), parameter.shape
        return *place, parameter._version, _steps().taken

    def copy_of(self, tensor: Tensor) -> Tensor | None:
        """fp32 on the host, where a copy is not older than the tensor."""
        if not _is_mirrored(tensor) or tensor not in self._known:
            return None
        known = self._of(tensor)
        return known.copy if known.state == self._state(tensor) else None

    def keep(self, tensor: Tensor, fetched: Tensor) -> Tensor:
        """The copy of a tensor, in memory of its own; the next calls find a parameter's."""
        with torch.inference_mode(False):  # a training may find it
            copy = fetched.to(torch.float32, copy=True)
        if _is_mirrored(tensor):
            known = self._of(tensor)
            known.state, known.copy = self._state(tensor), copy
        return copy

    def hold(self, parameter: Tensor, gradient: Tensor) -> None:
        """Adds a gradient [like the parameter, fp32] to what waits."""
        known, gradient = self._of(parameter), gradient.to(parameter.dtype)
        # In place: nobody else has it.
        known.waiting = gradient if known.waiting is None else known.waiting.add_(gradient)

    def with_held(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """What waited and a gradient, in the order in which they came; nothing waits any more."""
        known, gradient = self._of(parameter), gradient.to(parameter.dtype)
        waiting, known.waiting = known.waiting, None
        return gradient if waiting is None else waiting.add_(gradient)

    def forget_copies(self) -> None:
        """Takes every parameter for changed."""
        for known in self._known.values():
            known.state = known.copy = None

    def forget_held(self) -> None:
        """Drops what waits, as `zero_grad` does."""
        for known in self._known.values():
            known.waiting = None
