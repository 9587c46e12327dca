"""The experts that one model's routers choose, chosen in another model too.

Two computations of one function differ by rounding, which may tip a router's close decision and
then changes a whole expert, rightly. With the choices of the first model in both, all that is left
of a difference is the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comparators import assert_matches
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What routers choose with: each gives values and their indices along the dimension `dim`.
_CHOOSING = {torch.topk, Tensor.topk, torch.max, Tensor.max}


class RecordedChoices(TorchFunctionMode):
    """Notes the choices that are made within its block."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self._former: Tensor | None = None

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        # Of all values, or of two tensors, the largest is one tensor: no choice.
        if function not in _CHOOSING or isinstance(result, Tensor):
            return result
        scores = args[0]
        # A hybrid block may ask twice what its stock block asks once, of the same scores.
        if self._former is None or not torch.equal(scores, self._former):
            self.made.append(result.indices)
        self._former = scores.detach().clone()
        return self.chosen(scores, result, (kwargs or {}).get("dim", -1))

    def chosen(self, scores: Tensor, own: Any, dim: int) -> Any:
        """(values, indices) of the newest choice; `own` are those that were computed."""
        return own


class RepeatedChoices(RecordedChoices):
    """Makes the recorded choices again.

    Raises AssertionError where the own choice is not as good, within `bound` of the scores: that
    would be another router, and not a close decision.
    """

    def __init__(self, recorded: RecordedChoices, bound: float) -> None:
        super().__init__()
        self._recorded, self._bound = recorded.made, bound

    def chosen(self, scores: Tensor, own: Any, dim: int) -> Any:
        number = len(self.made) - 1
        assert number < len(self._recorded), f"choice {number} was not recorded"
        indices = self._recorded[number]
        assert indices.shape == own.indices.shape, f"choice {number} has another shape"
        values = scores.gather(dim, indices)
        best = own.values.sort(dim)[0]
        assert_matches(values.sort(dim)[0], best, self._bound, f"choice {number}")
        return type(own)((values, indices))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if error is None:
            assert len(self.made) == len(self._recorded), "fewer choices than were recorded"
