"""What is checked of tensors before their addresses leave for the compiled core, and after."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kt_sft.errors import KernelArgumentError

FLOAT_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def address_of(
    tensor: Tensor,
    name: str,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
) -> int:
    """The address of `tensor` once it is what the kernels read or write."""
    problems = []
    if tensor.device.type != "cpu":
        problems.append(f"device {tensor.device}, expected cpu")
    if tensor.dtype not in dtypes:
        problems.append(f"dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tuple(tensor.shape) != tuple(shape):
        problems.append(f"shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    elif not tensor.is_contiguous():
        problems.append(f"strides {tensor.stride()}, expected contiguous")
    if problems:
        raise KernelArgumentError(f"{name}: got " + "; ".join(problems))
    return tensor.data_ptr()


def refuse_pickling(self: object) -> tuple:
    """Stands for `__reduce__`. Raises TypeError."""
    raise TypeError(
        f"{type(self).__name__} cannot be pickled: packed experts and their threads belong to "
        "this process; load the model in the other process instead"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite; one pass over memory where they are."""
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(
        torch.isfinite(tensor).all()
    )
