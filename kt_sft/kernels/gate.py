"""What lies between the two halves of an expert: the activation and how the gate applies it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import kt_sft.kernels._core as _core


@dataclass(frozen=True)
class Gate:
    """h = act(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset).

    Without a gate h = act(min(up, limit)).

    activation: swish (x * sigmoid(alpha * x)), gelu (erf), gelu_tanh, relu or relu2 (squared).
    limit: infinity for no clamp. gpt-oss is Gate("swish", alpha=1.702, limit=7, up_offset=1).
    """

    activation: str = "swish"
    gated: bool = True
    alpha: float = 1.0
    limit: float = math.inf
    up_offset: float = 0.0

    @property
    def native(self) -> _core.Gate:
        """The same for the compiled core. Raises ValueError for an unknown activation."""
        return _core.Gate(**asdict(self))


_GELU_TANH = Gate("gelu_tanh")

# Names of Transformers' ACT2FN.
ACTIVATIONS: Mapping[str, Gate] = {
    "silu": Gate("swish"),
    "swish": Gate("swish"),
    "quick_gelu": Gate("swish", alpha=1.702),
    "gelu": Gate("gelu"),
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "relu": Gate("relu"),
    "relu2": Gate("relu2"),
}
