"""The dimensions of one layer's routed experts, read from the stock module they replace."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kt_sft.errors import UnsupportedModelError
from kt_sft.kernels import ACTIVATIONS, Gate


@dataclass(frozen=True)
class ExpertsShape:
    """E experts of D hidden and F intermediate channels, and what their gate computes."""

    experts: int
    hidden: int
    intermediate: int
    gate: Gate

    @classmethod
    def of(cls, module: nn.Module, path: str, activation: str) -> ExpertsShape:
        """Reads gate_up_proj [E, 2F, D] and down_proj [E, D, F] of a stock experts module.

        `activation` is the name in the model's configuration. Raises UnsupportedModelError.
        """
        gate_up = getattr(module, "gate_up_proj", None)
        down = getattr(module, "down_proj", None)
        shapes = [tuple(p.shape) if p is not None else None for p in (gate_up, down)]
        if any(s is None or len(s) != 3 for s in shapes):
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}): got gate_up_proj {shapes[0]} and down_proj "
                f"{shapes[1]}, expected [E, 2F, D] and [E, D, F]"
            )
        (experts, double, hidden), (experts_down, hidden_down, intermediate) = shapes  # type: ignore[misc]
        if (experts, hidden, double) != (experts_down, hidden_down, 2 * intermediate):
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}): gate_up_proj {shapes[0]} and down_proj "
                f"{shapes[1]} do not fit each other as [E, 2F, D] and [E, D, F]"
            )
        if activation not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"{path}: activation {activation!r} has no kernel; "
                f"supported are {', '.join(ACTIVATIONS)}"
            )
        return cls(experts, hidden, intermediate, ACTIVATIONS[activation])
