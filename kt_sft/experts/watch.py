"""Where NaN or Inf is first seen: layer, direction, tensor, token and expert.

The engine says of each result whether it is finite; the search runs only where it is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kt_sft.engines.protocol import PlacedExperts
from kt_sft.kernels import PROJECTIONS, Inputs
from kt_sft.kernels.checks import is_finite


class FiniteWatch:
    """Remembers the first place since `clear`; shared by all layers of a model."""

    def __init__(self) -> None:
        self.first: str | None = None

    def clear(self) -> None:
        """Starts a new step."""
        self.first = None

    def forward(self, path: str, experts: PlacedExperts, inputs: Inputs, out_TD: Tensor) -> None:
        """After a forward of one block whose output is not finite."""
        if self.first is not None:
            return
        hidden_TD, index_TK, weight_TK, *lora = inputs.tensors()
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
        chosen = [e for e in index_TK[token].tolist() if e < experts.layout.experts]
        for expert in chosen:
            for projection in experts.layout.projections:
                if not is_finite(experts.unpack(expert, projection)):
                    self.first = f"{path}: in the frozen {projection} of expert {expert}"
                    return
        self.first = f"{path}: out of finite inputs, for token {token} and experts {chosen}"

    def backward(self, path: str, d_out_TD: Tensor, d_hidden_TD: Tensor) -> None:
        """After a backward of one block whose gradient of hidden is not finite."""
        if self.first is not None:
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
