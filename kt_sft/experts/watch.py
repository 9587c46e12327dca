"""Where NaN or Inf is first seen: layer, direction, tensor, token and expert.

Looking is one sum over an output; the search for the place runs only when that sum is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kt_sft.kernels import PROJECTIONS


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite; one pass over memory where they are."""
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(
        torch.isfinite(tensor).all()
    )


class FiniteWatch:
    """Remembers the first place since `clear`; shared by all layers of a model."""

    def __init__(self) -> None:
        self.first: str | None = None

    def clear(self) -> None:
        """Starts a new step."""
        self.first = None

    def forward(
        self,
        path: str,
        weights: Any,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        lora: Sequence[Tensor],
        out_TD: Tensor,
    ) -> None:
        """After the forward of one block; `lora` is a and b of gate, up and down."""
        if self.first is not None or is_finite(out_TD):
            return
        for name, tensor in (("hidden states", hidden_TD), ("routing weights", weight_TK)):
            if not is_finite(tensor):
                place = f"{name} that reach the experts, token {_first_row(tensor)}"
                self.first = f"{path}: in the {place}"
                return
        for number, factors in enumerate(lora):
            if factors.numel() and not is_finite(factors):
                name = f"{PROJECTIONS[number // 2]}.lora_{'AB'[number % 2]}"
                whose = f"of expert {_first_row(factors)}" if len(factors) > 1 else "of all experts"
                self.first = f"{path}: in {name} {whose}"
                return
        token = _first_row(out_TD)
        chosen = [e for e in index_TK[token].tolist() if e < weights.experts]
        for expert in chosen:
            for projection in weights.projections:
                if not is_finite(weights.unpack(expert, projection)):
                    self.first = f"{path}: in the frozen {projection} of expert {expert}"
                    return
        self.first = f"{path}: out of finite inputs, for token {token} and experts {chosen}"

    def backward(self, path: str, d_out_TD: Tensor, d_hidden_TD: Tensor) -> None:
        """After the backward of one block."""
        if self.first is not None or is_finite(d_hidden_TD):
            return
        if not is_finite(d_out_TD):
            self.first = f"{path}: in the gradient of its output, token {_first_row(d_out_TD)}"
        else:
            token = _first_row(d_hidden_TD)
            self.first = f"{path}: in the gradient of its input, token {token}"


def _first_row(tensor: Tensor) -> int:
    """The first index of dimension 0 that holds NaN or Inf."""
    bad = ~torch.isfinite(tensor).flatten(1).all(1)
    return int(bad.nonzero()[0])
