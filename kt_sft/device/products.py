"""Products of rows that are sorted by expert with a matrix of each expert.

Legend: n experts, M rows, N outputs, C inputs, r LoRA rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kt_sft.device.bringing import bring

# torch 2.10 made it public; before, it was there by another name.
_grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
# Rows of its operands begin at multiples of this.
_ALIGNMENT_BYTES = 16
# CUDA's compute capability whose grouped products are torch's fast ones.
_HOPPER = (9, 0)


@dataclass(frozen=True)
class Groups:
    """The number of rows of each expert, on the host, and where they end, on the device."""

    counts: tuple[int, ...]
    ends: Tensor  # int32 [n]

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device) -> Groups:
        """From the counts alone."""
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32)
        return cls(tuple(counts), bring(ends, device))

    @property
    def rows(self) -> int:
        """Of all experts."""
        return sum(self.counts)

    def slices(self) -> list[slice]:
        """The rows of each expert."""
        return [slice(a, b) for a, b in pairwise((0, *accumulate(self.counts)))]

    def spread(self, values: Tensor) -> Tensor:
        """Each row's, [M, ...] from [n, ...]."""
        counts = bring(torch.tensor(self.counts), values.device)
        return values.repeat_interleave(counts, 0, output_size=self.rows)


def times(x_MC: Tensor, weights_nCN: Tensor, groups: Groups) -> Tensor:
    """[M, N]: rows by the matrix of their expert."""
    if _takes(x_MC, weights_nCN):
        return _grouped_mm(x_MC, weights_nCN, offs=groups.ends)
    out = x_MC.new_empty(len(x_MC), weights_nCN.shape[2])
    for rows, matrix in zip(groups.slices(), weights_nCN, strict=True):
        torch.mm(x_MC[rows], matrix, out=out[rows])
    return out


def outer(a_MN: Tensor, b_MC: Tensor, groups: Groups) -> Tensor:
    """[n, N, C]: for each expert a' b over its rows; zeros for one without rows."""
    if _takes(a_MN.T, b_MC):
        return _grouped_mm(a_MN.T, b_MC, offs=groups.ends)
    out = a_MN.new_empty(len(groups.counts), a_MN.shape[1], b_MC.shape[1])
    for rows, matrix in zip(groups.slices(), out, strict=True):
        torch.mm(a_MN[rows].T, b_MC[rows], out=matrix)
    return out


def _aligned(tensor: Tensor) -> bool:
    """Whether its rows or its columns lie as the grouped product wants them."""
    size = tensor.element_size()
    strides = tensor.stride()[-2:]
    return 1 in strides and max(strides) * size % _ALIGNMENT_BYTES == 0


def _takes(left: Tensor, right: Tensor) -> bool:
    return (
        bool(left.numel() and right.numel())
        and _aligned(left)
        and _aligned(right)
        # Its result is laid out by rows.
        and right.shape[-1] * right.element_size() % _ALIGNMENT_BYTES == 0
        and has_grouped_products(left.device, left.dtype)
    )


@functools.cache
def has_grouped_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has them there and they are right, experts without rows included."""
    if _grouped_mm is None or dtype != torch.bfloat16:
        return False
    if device.type == "cuda" and (
        torch.version.cuda is None or torch.cuda.get_device_capability(device) != _HOPPER
    ):
        # Elsewhere torch waits for the device and loops, or leaves garbage for experts without
        # rows.
        return False
    counts = (3, 0, 13)
    groups = Groups.of(counts, device)
    x = torch.arange(16 * 8, device=device).reshape(16, 8).remainder(5).to(dtype)
    w = torch.arange(3 * 8 * 16, device=device).reshape(3, 8, 16).remainder(3).to(dtype)
    rows = groups.slices()
    want = (
        torch.cat([x[r] @ m for r, m in zip(rows, w, strict=True)]),
        torch.stack([x[r].T @ x[r] for r in rows]),
    )
    try:
        found = _grouped_mm(x, w, offs=groups.ends), _grouped_mm(x.T, x, offs=groups.ends)
        return all(torch.equal(f, w) for f, w in zip(found, want, strict=True))
    except (RuntimeError, NotImplementedError, ValueError):
        return False
