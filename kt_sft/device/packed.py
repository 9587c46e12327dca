"""Packed experts as tensors of any device, and their weights.

How the bytes lie is said in csrc/formats, a header for each format.

Legend: n experts of a piece, P panels of 32 outputs, B blocks of 64 inputs, N outputs and C inputs
of a projection, padded to P * 32 and B * 64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kt_sft.device.bringing import bring
from kt_sft.kernels import PROJECTIONS, Coding, ExpertWeights, WeightLayout
from kt_sft.kernels.formats import SCALE_DTYPES, code_values, implied_zero, scale_values

_PANEL, _BLOCK = 32, 64
# A multiplier of int4 whose levels are -7..8 instead of -8..7.
_RAISED = 0x80


@dataclass(frozen=True)
class PackedPiece:
    """Some experts of a layer: uint8 [n, bytes of one expert] for every section of the layout."""

    layout: WeightLayout
    sections: Mapping[str, Tensor]

    @classmethod
    def of(cls, weights: ExpertWeights) -> PackedPiece:
        """All experts of a layer, where they lie on the host."""
        layout = weights.layout
        found = {}
        for name, size in expert_bytes(layout).items():
            whole = weights.section(name)
            found[name] = whole[: layout.experts * size].view(layout.experts, size)
        return cls(layout, found)

    def __len__(self) -> int:
        return len(self.sections["tiles"])

    @property
    def device(self) -> torch.device:
        """Of all sections."""
        return self.sections["tiles"].device

    def take(self, experts: Sequence[int]) -> PackedPiece:
        """Copies of some experts; consecutive ones are views."""
        first = experts[0] if experts else 0
        if list(experts) == list(range(first, first + len(experts))):
            found = {k: t[first : first + len(experts)] for k, t in self.sections.items()}
        else:
            index = bring(torch.tensor(experts, dtype=torch.int64), self.device)
            found = {k: t.index_select(0, index) for k, t in self.sections.items()}
        return PackedPiece(self.layout, found)

    def to(self, device: torch.device) -> PackedPiece:
        """The same experts on another device."""
        return PackedPiece(self.layout, {k: t.to(device) for k, t in self.sections.items()})

    def weights(self, projection: str, dtype: torch.dtype) -> Tensor:
        """What is computed with, [n, N, C], rounded once to `dtype`."""
        outputs, inputs = self.layout.shape(projection)
        values = _FORMS[self.layout.weights](_Matrix(self, projection), dtype)
        return values[:, :outputs, :inputs]

    def bias(self, projection: str) -> Tensor | None:
        """fp32 [n, N], or None."""
        if projection not in self.layout.biased:
            return None
        outputs, _ = self.layout.shape(projection)
        return _Matrix(self, projection).section("biases", torch.float32)[:, :outputs]


def expert_bytes(layout: WeightLayout) -> dict[str, int]:
    """Section -> bytes of one expert, for sections that are not empty."""
    return {name: sum(sizes) for name, sizes in layout.matrix_bytes().items()}


def unpacked_bytes(layout: WeightLayout) -> int:
    """The most that one expert takes while a projection of it is unpacked, in bytes."""
    outputs, inputs = layout.shape("up_proj")
    # Published codes take the most: bytes, what they stand for and their scales in fp32, a product.
    each = 1 + 4 + 4 + 4 if layout.weights == "coded" else 1 + 1 + 1
    return each * outputs * inputs


@dataclass(frozen=True)
class _Matrix:
    """One projection of a piece."""

    piece: PackedPiece
    projection: str

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs), not padded."""
        return self.piece.layout.shape(self.projection)

    @property
    def grid(self) -> tuple[int, int]:
        """(P, B)."""
        outputs, inputs = self.shape
        return -(-outputs // _BLOCK) * _BLOCK // _PANEL, -(-inputs // _BLOCK)

    def section(self, name: str, dtype: torch.dtype = torch.uint8) -> Tensor:
        """[n, elements] of a section."""
        sizes = self.piece.layout.matrix_bytes()[name]
        which = PROJECTIONS.index(self.projection)
        begin = sum(sizes[:which])
        found = self.piece.sections[name][:, begin : begin + sizes[which]]
        # A view needs rows that begin at multiples of the element.
        return found.view(dtype) if dtype == torch.uint8 else found.contiguous().view(dtype)

    def multipliers(self, blocks: int, halves: int) -> Tensor:
        """int4's, [n, P, blocks, 2, halves, 16]; the section is larger."""
        panels = self.grid[0]
        found = self.section("multipliers")[:, : panels * blocks * 2 * halves * 16]
        return found.reshape(len(self.piece), panels, blocks, 2, halves, 16)

    def scaled(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, N, C] of integers [n, P, 2, 16, ...inputs], by the scales of their outputs: one
        rounding, and one pass over memory on an accelerator."""
        n, (panels, blocks) = len(self.piece), self.grid
        scales = self.section("scales", torch.float32)[:, : panels * _PANEL]
        scales = scales.reshape(n, panels, 2, 16, *[1] * (values.dim() - 4))
        out = torch.empty(values.shape, dtype=dtype, device=values.device)
        return torch.mul(values, scales, out=out).view(n, panels * _PANEL, blocks * _BLOCK)


def _int8(matrix: _Matrix, dtype: torch.dtype) -> Tensor:
    n, (panels, blocks) = len(matrix.piece), matrix.grid
    tiles = matrix.section("tiles").reshape(n, panels, blocks, 2, 16, 16, 4)
    # Without the highest bit turned over, 128 would have to be subtracted.
    codes = (tiles ^ 0x80).view(torch.int8)
    return matrix.scaled(codes.permute(0, 1, 3, 5, 2, 4, 6), dtype)


def _nibbles(tiles: Tensor) -> Tensor:
    """[2, ...]: the lower and the upper halves of bytes."""
    return torch.stack((tiles & 15, tiles >> 4))


def _int4(group: int) -> Callable[[_Matrix, torch.dtype], Tensor]:
    halves = 2 if group == 32 else 1  # of a block of inputs, with multipliers of their own

    def unpack(matrix: _Matrix, dtype: torch.dtype) -> Tensor:
        n, (panels, blocks) = len(matrix.piece), matrix.grid
        tiles = matrix.section("tiles").reshape(n, panels, blocks, 2, 8, 16, 4)
        # [half of the inputs, n, P, B, half of the outputs, 8, 16, 4]
        codes = _nibbles(tiles).permute(1, 2, 4, 6, 3, 0, 5, 7).view(torch.int8)
        groups = blocks if group == 32 else -(-blocks // 2)
        # [n, P, 2, 16, groups, halves]
        factors = matrix.multipliers(groups, halves).permute(0, 1, 3, 5, 2, 4)
        if group == 128:  # one for two blocks
            factors = factors.repeat_interleave(2, 4)[:, :, :, :, :blocks]
        factors = factors[..., None, None]
        lowest = torch.where(factors >= _RAISED, 7, 8).to(torch.int8)
        # A multiplier times a level is an int8 weight.
        values = (codes - lowest) * (factors & 31).view(torch.int8)
        return matrix.scaled(values, dtype)

    return unpack


def _bf16(matrix: _Matrix, dtype: torch.dtype) -> Tensor:
    n, (panels, blocks) = len(matrix.piece), matrix.grid
    tiles = matrix.section("tiles", torch.bfloat16).reshape(n, panels, blocks, 32, 32, 2)
    return tiles.permute(0, 1, 4, 2, 3, 5).reshape(n, panels * 32, blocks * 64).to(dtype)


def _coded(matrix: _Matrix, dtype: torch.dtype) -> Tensor:
    n, (panels, blocks) = len(matrix.piece), matrix.grid
    coding = matrix.piece.layout.coding
    assert coding is not None
    if coding.bits == 4:
        tiles = matrix.section("tiles").reshape(n, panels, blocks, 16, 32, 2)
        codes = _nibbles(tiles).permute(1, 2, 5, 3, 0, 4, 6)
    else:
        tiles = matrix.section("tiles").reshape(n, panels, blocks, 32, 32, 2)
        codes = tiles.permute(0, 1, 4, 2, 3, 5)
    outputs, inputs = matrix.shape
    codes = codes.reshape(n, panels * 32, blocks * 64)[:, :outputs, :inputs]
    values = code_values(coding.codes, codes)
    if coding.zeros:
        values = values - _spread(coding, matrix, matrix.section("zeros").float())
    else:
        values = values - implied_zero(coding.codes)
    stored = matrix.section("scales", SCALE_DTYPES[coding.scales])
    values = values * _spread(coding, matrix, scale_values(coding.scales, stored))
    return values.bfloat16().to(dtype)  # as the kernels round them


def _spread(coding: Coding, matrix: _Matrix, groups: Tensor) -> Tensor:
    """What each weight's group has, from [n, groups along the inputs * along the outputs]."""
    outputs, inputs = matrix.shape
    along_inputs, along_outputs = coding.groups(outputs, inputs)
    grid = groups.reshape(len(matrix.piece), along_inputs, along_outputs).transpose(1, 2)
    rows = grid.repeat_interleave(coding.group_outputs, 1)[:, :outputs]
    return rows.repeat_interleave(coding.group_inputs or inputs, 2)[:, :, :inputs]


# Format -> what unpacks a matrix, padding included where it is there.
_FORMS: dict[str, Callable[[_Matrix, torch.dtype], Tensor]] = {
    "int8": _int8,
    "bf16": _bf16,
    "int4_g32": _int4(32),
    "int4_g128": _int4(128),
    "coded": _coded,
}
