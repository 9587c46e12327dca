"""The forms in which one layer's experts are packed, and matrices in a published coding.

Legend: E experts, D hidden size, F intermediate size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import kt_sft.kernels._core as _core
from kt_sft.errors import KernelArgumentError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# Our own formats: quantized here from float weights. They are rows of KT_FORMATS in csrc/formats.
OWN_FORMATS = tuple(_core.OWN_FORMATS)
# What `weights:` may say besides: another name for one of them, or the form that was published.
ALIASES = {"int4": "int4_g32"}
AS_PUBLISHED = "checkpoint"
WEIGHTS = (*OWN_FORMATS, *ALIASES, AS_PUBLISHED)

SCALE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "e8m0": torch.uint8,  # 2^(byte - 127)
}
_FP4_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_IMPLIED_ZERO = {"uint8": 128, "uint4": 8}


@dataclass(frozen=True)
class Coding:
    """How a published format stores a matrix: weight = (value(code) - zero) * scale.

    codes: e4m3 (fp8), e2m1 (fp4), uint8 or uint4. scales: a key of SCALE_DTYPES. Groups are of
    `group_outputs` by `group_inputs` weights; 0 inputs means whole rows. zeros: groups have zero
    points; otherwise it is 128 or 8, and 0 for floats.
    """

    codes: str
    scales: str
    group_outputs: int
    group_inputs: int
    zeros: bool = False

    def groups(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Number of groups along the inputs and along the outputs."""
        width = self.group_inputs or inputs
        return -(-inputs // width), -(-outputs // self.group_outputs)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self.codes in ("e2m1", "uint4") else 8

    def as_tuple(self) -> tuple[str, str, int, int, bool]:
        """In the order that the compiled core reads."""
        whole_row = 1 << 20
        width = self.group_inputs or whole_row
        return self.codes, self.scales, self.group_outputs, width, self.zeros


# What int8 per output channel is as a coding: such checkpoints are kept as int8.
INT8_CODING = Coding("uint8", "float32", 1, 0)


@dataclass(frozen=True)
class CodedMatrix:
    """One matrix in a published coding: codes uint8 [outputs, inputs], a code in each byte;
    scales [groups of outputs, groups of inputs]; zeros uint8, of the same shape, or None."""

    coding: Coding
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.codes.shape[0], self.codes.shape[1]

    def __getitem__(self, chosen: slice) -> CodedMatrix:
        """Some of the outputs; groups of outputs are undone where the cut is inside of one."""
        size = self.coding.group_outputs
        start, stop, step = chosen.indices(self.shape[0])
        aligned = step == 1 and start % size == 0 and (stop % size == 0 or stop == self.shape[0])
        groups = slice(start // size, -(-stop // size)) if aligned else chosen
        source = self if aligned else self.ungrouped()
        return replace(
            source,
            codes=self.codes[chosen],
            scales=source.scales[groups],
            zeros=None if source.zeros is None else source.zeros[groups],
        )

    def columns(self, begin: int, end: int) -> CodedMatrix:
        """Some of the inputs; `begin` must not be inside of a group."""
        size = self.coding.group_inputs or self.shape[1]
        groups = slice(begin // size, -(-end // size))
        return replace(
            self,
            codes=self.codes[:, begin:end],
            scales=self.scales[:, groups],
            zeros=None if self.zeros is None else self.zeros[:, groups],
        )

    def ungrouped(self) -> CodedMatrix:
        """The same with a scale for each output."""
        size, outputs = self.coding.group_outputs, self.shape[0]
        if size == 1:
            return self

        def spread(t: Tensor) -> Tensor:
            return t.repeat_interleave(size, 0)[:outputs]

        return replace(
            self,
            coding=replace(self.coding, group_outputs=1),
            scales=spread(self.scales),
            zeros=None if self.zeros is None else spread(self.zeros),
        )

    def fitted(self, coding: Coding) -> CodedMatrix:
        """The same weights in the groups of `coding`, as far as that takes no rounding.

        Groups of outputs may be split, and a single group along the inputs may be called longer.
        """
        matrix = self.ungrouped() if coding.group_outputs == 1 else self
        width = coding.group_inputs
        if matrix.scales.shape[1] == 1 and (not width or width >= self.shape[1]):
            matrix = replace(matrix, coding=replace(matrix.coding, group_inputs=width))
        return matrix

    def dequantize(self) -> Tensor:
        """The weights in fp32 [outputs, inputs]: the product of code and scale, rounded to fp32."""
        outputs, inputs = self.shape
        values = code_values(self.coding.codes, self.codes)
        width = self.coding.group_inputs or inputs

        def spread(t: Tensor) -> Tensor:
            rows = t.repeat_interleave(self.coding.group_outputs, 0)[:outputs]
            return rows.repeat_interleave(width, 1)[:, :inputs]

        if self.zeros is not None:
            values = values - spread(self.zeros.float())
        else:
            values = values - implied_zero(self.coding.codes)
        return values * spread(scale_values(self.coding.scales, self.scales))


def code_values(codes: str, values: Tensor) -> Tensor:
    """What codes stand for before zero point and scale, fp32."""
    if codes == "e4m3":
        return values.contiguous().view(torch.float8_e4m3fn).float()
    if codes == "e2m1":
        return _fp4_levels(values.device)[values.int()]
    return values.float()


@functools.cache
def _fp4_levels(device: torch.device) -> Tensor:
    """Made once: to bring it there waits for an accelerator."""
    with torch.inference_mode(False):
        return torch.tensor([*_FP4_LEVELS, *(-v for v in _FP4_LEVELS)], device=device)


def implied_zero(codes: str) -> int:
    """The zero point of codes whose groups have none."""
    return _IMPLIED_ZERO.get(codes, 0)


def scale_values(scales: str, values: Tensor) -> Tensor:
    """Scales in fp32."""
    if scales == "e8m0":
        # The byte is the exponent of an fp32 number; 0 is the largest power below normal ones.
        bits = torch.where(values == 0, 1 << 22, values.int() << 23)
        return bits.int().view(torch.float32)
    return values.float()


@dataclass(frozen=True)
class WeightLayout:
    """What one layer's packed experts are: sizes, format, gate, and which projections have biases.

    weights: a name of OWN_FORMATS, or "coded" with its coding.
    """

    experts: int
    hidden: int
    intermediate: int
    weights: str
    gated: bool = True
    biased: frozenset[str] = field(default_factory=frozenset)
    coding: Coding | None = None

    def __post_init__(self) -> None:
        try:
            self.native  # noqa: B018 - the compiled core checks it
        except (ValueError, TypeError) as error:
            raise KernelArgumentError(f"layout of packed experts: {error}") from error

    @cached_property
    def native(self) -> Any:
        """The same for the compiled core."""
        return _core.PackedLayout(
            self.experts,
            self.hidden,
            self.intermediate,
            self.weights,
            self.gated,
            [p in self.biased for p in PROJECTIONS],
            None if self.coding is None else self.coding.as_tuple(),
        )

    @property
    def arithmetic(self) -> str | None:
        """bf16 for formats that are multiplied as floats; None where the settings choose."""
        return "bf16" if self.native.is_float else None

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections that these experts have, in order."""
        return PROJECTIONS if self.gated else PROJECTIONS[1:]

    def shape(self, projection: str) -> tuple[int, int]:
        """(outputs, inputs) of one expert's projection."""
        if projection == "down_proj":
            return self.hidden, self.intermediate
        return self.intermediate, self.hidden

    def section_bytes(self) -> dict[str, int]:
        """Name -> bytes of every section of the packed memory that is not empty."""
        return dict(self.native.section_bytes)

    def matrix_bytes(self) -> dict[str, list[int]]:
        """Section -> bytes of one expert's gate, up and down; experts follow each other."""
        return self.native.matrix_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all sections."""
        return sum(self.section_bytes().values())

    @property
    def weight_count(self) -> int:
        """The number of weights of all experts."""
        return len(self.projections) * self.experts * self.hidden * self.intermediate

    @property
    def channel_granule(self) -> int:
        """Intermediate channels can be cut at multiples of this."""
        return int(self.native.channel_granule)

    def part(self, channels: int, down_bias: bool) -> WeightLayout:
        """The layout of `channels` of the intermediate channels."""
        biased = self.biased if down_bias else self.biased - {"down_proj"}
        return replace(self, intermediate=channels, biased=biased)
