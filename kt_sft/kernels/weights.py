"""The frozen weights of one layer's experts: packing, reading back, and their memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import kt_sft.kernels._core as _core
from kt_sft.errors import KernelArgumentError
from kt_sft.kernels.checks import FLOAT_NAMES, address_of, refuse_pickling
from kt_sft.kernels.engine import Engine
from kt_sft.kernels.formats import (
    INT8_CODING,
    SCALE_DTYPES,
    CodedMatrix,
    WeightLayout,
)


class ExpertWeights:
    """The frozen weights of one layer's experts, packed in host memory.

    Neither a Parameter nor a buffer: nothing that moves, copies or broadcasts a model sees it.
    A deep copy shares the memory.
    """

    def __init__(self, layout: WeightLayout, packed: Mapping[str, Tensor] | None = None) -> None:
        """Empty weights, or those in `packed`: uint8 sections as `sections()` returns them.

        Packed memory is read only and kept alive. Raises KernelArgumentError.
        """
        self.layout = layout
        self._packed = packed
        addresses = None
        if packed is not None:
            sizes = layout.section_bytes()
            if set(packed) != set(sizes):
                raise KernelArgumentError(
                    f"packed: got the sections {sorted(packed)}, expected {sorted(sizes)}"
                )
            addresses = [
                address_of(packed[name], name, (sizes[name],), [torch.uint8])
                if name in sizes
                else 0
                for name in _core.SECTIONS
            ]
        self.handle = _core.PackedExperts(layout.native, addresses)

    def __deepcopy__(self, memo: dict) -> ExpertWeights:
        return self

    __reduce__ = refuse_pickling

    @property
    def nbytes(self) -> int:
        """Bytes of host memory, scales included."""
        return self.handle.nbytes

    @property
    def experts(self) -> int:
        """E."""
        return self.layout.experts

    @property
    def hidden(self) -> int:
        """D."""
        return self.layout.hidden

    @property
    def intermediate(self) -> int:
        """F."""
        return self.layout.intermediate

    @property
    def gated(self) -> bool:
        """Whether there is a gate projection."""
        return self.layout.gated

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections that these experts have, in order."""
        return self.layout.projections

    def shape(self, projection: str) -> tuple[int, int]:
        """(outputs, inputs) of one expert's projection."""
        return self.layout.shape(projection)

    def sections(self) -> dict[str, memoryview]:
        """The packed memory by section, read only; valid as long as these weights live."""
        return {
            name: memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B").toreadonly()
            for name, (address, size) in self.handle.sections.items()
        }

    def section(self, name: str) -> Tensor:
        """A section as uint8 of the CPU, to be read only; this keeps these weights alive."""
        if self._packed is not None:
            return self._packed[name]
        address, size = self.handle.sections[name]
        memory: Any = (ctypes.c_ubyte * size).from_address(address)
        memory.owner = self  # torch holds the buffer, and so these weights
        return torch.frombuffer(memory, dtype=torch.uint8)

    def pack(self, engine: Engine, expert: int, projection: str, weight: Tensor) -> None:
        """Quantizes and packs one expert's projection, [outputs, inputs] in fp32, bf16 or fp16.

        Rows may be strided. Raises KernelArgumentError, or ValueError for NaN and Inf.
        """
        self._check_place(expert, projection)
        if tuple(weight.shape) != self.shape(projection) or weight.dtype not in FLOAT_NAMES:
            raise KernelArgumentError(
                f"{projection} of expert {expert}: got {weight.dtype} {tuple(weight.shape)}, "
                f"expected a float tensor of shape {self.shape(projection)}"
            )
        if weight.device.type != "cpu" or (weight.stride(1) != 1 and weight.shape[1] > 1):
            weight = weight.cpu().contiguous()
        self.handle.pack(
            engine.handle,
            expert,
            projection,
            FLOAT_NAMES[weight.dtype],
            weight.data_ptr(),
            weight.stride(0),
        )

    def pack_codes(self, engine: Engine, expert: int, projection: str, matrix: CodedMatrix) -> None:
        """Packs one expert's projection as published, in the coding of the layout, or in int8.

        Raises KernelArgumentError, or ValueError for codes of NaN and scales of NaN or Inf.
        """
        self._check_place(expert, projection)
        shape = self.shape(projection)
        coding = self.layout.coding or INT8_CODING
        if matrix.coding != coding:
            raise KernelArgumentError(
                f"{projection} of expert {expert}: got {matrix.coding}, expected {coding}"
            )
        groups = coding.groups(*shape)
        dtype = SCALE_DTYPES[coding.scales]
        codes = matrix.codes.contiguous()
        if coding.bits == 4 and codes.numel() and int(codes.max()) > 15:
            raise KernelArgumentError(f"{projection} codes: got {int(codes.max())}, expected 0..15")
        scales = matrix.scales.T.contiguous()
        addresses = [
            address_of(codes, f"{projection} codes", shape, [torch.uint8]),
            shape[1],
            address_of(scales, f"{projection} scales", groups, [dtype]),
            0,
        ]
        if coding.zeros:
            assert matrix.zeros is not None
            zeros = matrix.zeros.T.contiguous()
            if coding.bits == 4 and int(zeros.max()) > 15:
                raise KernelArgumentError(
                    f"{projection} zeros: got {int(zeros.max())}, expected 0..15"
                )
            addresses[3] = address_of(zeros, f"{projection} zeros", groups, [torch.uint8])
        self.handle.pack_codes(engine.handle, expert, projection, *addresses)

    def take_channels(self, engine: Engine, source: ExpertWeights, first: int) -> None:
        """Copies the intermediate channels from `first` on out of weights of the same format."""
        self.handle.take_channels(engine.handle, source.handle, first)

    def take_experts(self, engine: Engine, source: ExpertWeights, experts: Sequence[int]) -> None:
        """Copies experts, one for each of these, out of weights of the same sizes and format."""
        self.handle.take_experts(engine.handle, source.handle, list(experts))

    def unpack(self, expert: int, projection: str) -> Tensor:
        """The weights that the kernels compute with, fp32 [outputs, inputs]."""
        self._check_place(expert, projection)
        out = torch.empty(self.shape(projection), dtype=torch.float32)
        self.handle.unpack(expert, projection, out.data_ptr())
        return out

    def set_bias(self, expert: int, projection: str, bias: Tensor) -> None:
        """Adds a frozen bias [outputs] to one expert's projection that the layout has one for.

        Raises KernelArgumentError, or ValueError for NaN and Inf.
        """
        self._check_place(expert, projection)
        values = bias.detach().to(device="cpu", dtype=torch.float32).contiguous()
        outputs = self.shape(projection)[0]
        self.handle.set_bias(
            expert,
            projection,
            address_of(values, f"{projection} bias", (outputs,), [torch.float32]),
        )

    def _check_place(self, expert: int, projection: str) -> None:
        if not 0 <= expert < self.experts:
            raise KernelArgumentError(f"expert: got {expert}, expected 0 to {self.experts - 1}")
        if projection not in self.projections:
            raise KernelArgumentError(
                f"projection: got {projection!r}, expected {' or '.join(self.projections)}"
            )
