"""What lies between an expert's two halves, in torch's operations.

Legend: M rows, F intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kt_sft.kernels import Gate

_ACTIVATIONS: dict[str, Callable[[Gate, Tensor], Tensor]] = {
    "swish": lambda gate, x: x * torch.sigmoid(gate.alpha * x),
    "gelu": lambda _, x: F.gelu(x),
    "gelu_tanh": lambda _, x: F.gelu(x, approximate="tanh"),
    "relu": lambda _, x: torch.relu(x),
    "relu2": lambda _, x: torch.relu(x).square(),
}


def apply(kind: Gate, inner: Sequence[Tensor]) -> Tensor:
    """h [M, F] in fp32, from the outputs of gate, if there is one, and up; see Gate."""
    act = partial(_ACTIVATIONS[kind.activation], kind)
    *gate, up_MF = (t.float() for t in inner)
    if not gate:
        return act(up_MF.clamp(max=kind.limit))
    return act(gate[0].clamp(max=kind.limit)) * (
        up_MF.clamp(-kind.limit, kind.limit) + kind.up_offset
    )


def backward(kind: Gate, inner: Sequence[Tensor], d_h_MF: Tensor) -> tuple[Tensor, ...]:
    """The gradients of what `apply` takes, fp32."""
    leaves = [t.detach().float().requires_grad_() for t in inner]
    with torch.enable_grad():
        return torch.autograd.grad(apply(kind, leaves), leaves, d_h_MF)
