"""The masks of LoRA's dropout: the hash that the compiled kernels use, in torch's operations.

Legend: M rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kt_sft.kernels import PROJECTIONS, Call

_SIGN = -(2**31)


def _signed(value: int, bits: int = 64) -> int:
    """The number whose two's complement these bits are: torch has no unsigned arithmetic."""
    return value - (1 << bits) if value >> (bits - 1) else value


def _shifted(values: Tensor, by: int) -> Tensor:
    """A logical shift to the right."""
    width = 8 * values.element_size()
    return (values >> by) & ((1 << (width - by)) - 1)


def _row_keys(seed: int, slots_M: Tensor, projection: int) -> Tensor:
    """splitmix64 of (seed, token and choice, projection), low 32 bits as int32 [M]."""
    number = slots_M.long() * len(PROJECTIONS) + (projection + 1)
    z = number * _signed(0x9E3779B97F4A7C15) + _signed(seed)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = (z ^ _shifted(z, 31)) & 0xFFFFFFFF
    return torch.where(z >= 2**31, z - 2**32, z).int()


def dropped(call: Call, slots_M: Tensor, projection: str, x: Tensor) -> Tensor:
    """x [M, width] as LoRA of a projection sees it, and its gradient as x gets it: what is kept,
    over 1 - p. slots: token * K + choice of each row."""
    if call.dropout == 0.0:
        return x
    which = PROJECTIONS.index(projection)
    first = call.first_channel if projection == "down_proj" else 0
    columns = torch.arange(first, first + x.shape[1], dtype=torch.int32, device=x.device)
    hashed = _row_keys(call.dropout_seed, slots_M, which)[:, None] + columns * _signed(
        0x9E3779B1, 32
    )
    hashed ^= _shifted(hashed, 16)
    hashed *= _signed(0x7FEB352D, 32)
    hashed ^= _shifted(hashed, 15)
    hashed *= _signed(0x846CA68B, 32)
    hashed ^= _shifted(hashed, 16)
    # Unsigned comparison: with the sign turned over, signed numbers have its order.
    threshold = _signed(int(float(np.float32(call.dropout)) * 2.0**32), 32)
    keep = (hashed ^ _SIGN) >= (threshold ^ _SIGN)
    return torch.where(keep, x * float(1 / (1 - np.float32(call.dropout))), 0.0).to(x.dtype)
