"""What lies between an expert's two halves, and its derivatives, in torch's operations.

Derivatives are written out: autograd gives an accelerator's backward to one thread, which is the
one that waits for these.

Legend: M rows, F intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kt_sft.kernels import Gate

_TANH_FACTOR, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def _swish(gate: Gate, x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(gate.alpha * x)
    value = x * s
    return value, s + gate.alpha * value * (1 - s)


def _gelu(_: Gate, x: Tensor) -> tuple[Tensor, Tensor]:
    below = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * below, below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh(_: Gate, x: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(_TANH_FACTOR * (x + _TANH_CUBE * x**3))
    inner = _TANH_FACTOR * (1 + 3 * _TANH_CUBE * x * x)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner


def _relu(_: Gate, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(x), (x > 0).to(x.dtype)


def _relu2(_: Gate, x: Tensor) -> tuple[Tensor, Tensor]:
    positive = torch.relu(x)
    return positive.square(), 2 * positive


# Activation -> its value and its slope.
_ACTIVATIONS: dict[str, Callable[[Gate, Tensor], tuple[Tensor, Tensor]]] = {
    "swish": _swish,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
}


def apply(kind: Gate, inner: Sequence[Tensor]) -> Tensor:
    """h [M, F] in fp32, from the outputs of gate, if there is one, and up; see Gate."""
    first, *up = (t.float() for t in inner)
    value, _ = _ACTIVATIONS[kind.activation](kind, first.clamp(max=kind.limit))
    return value * _scaled_up(kind, up[0]) if up else value


def backward(kind: Gate, inner: Sequence[Tensor], d_h_MF: Tensor) -> tuple[Tensor, ...]:
    """The gradients of what `apply` takes, fp32."""
    first, *up = (t.float() for t in inner)
    value, slope = _ACTIVATIONS[kind.activation](kind, first.clamp(max=kind.limit))
    d_value = d_h_MF * _scaled_up(kind, up[0]) if up else d_h_MF
    d_first = d_value * slope * (first <= kind.limit)
    return (d_first, *(d_h_MF * value * (u.abs() <= kind.limit) for u in up))


def _scaled_up(kind: Gate, up_MF: Tensor) -> Tensor:
    return up_MF.clamp(-kind.limit, kind.limit) + kind.up_offset
