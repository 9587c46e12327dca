"""One pool of threads that computes on packed weights where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kt_sft.engines.host import HostExperts, LoraGradients
from kt_sft.kernels import (
    BlockReport,
    Call,
    CodedMatrix,
    Engine,
    ExpertWeights,
    Inputs,
    Kept,
    WeightLayout,
    backward,
    forward,
)


class CpuExperts(HostExperts):
    """The experts of one layer in one piece of memory."""

    def __init__(self, engine: Engine, weights: ExpertWeights) -> None:
        super().__init__()
        self._engine, self.weights = engine, weights

    @property
    def layout(self) -> WeightLayout:
        """Of the weights."""
        return self.weights.layout

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return self.weights.nbytes

    def pack(self, expert: int, projection: str, weight: Tensor) -> None:
        """See PlacedExperts."""
        self.weights.pack(self._engine, expert, projection, weight)

    def pack_codes(self, expert: int, projection: str, matrix: CodedMatrix) -> None:
        """See PlacedExperts."""
        self.weights.pack_codes(self._engine, expert, projection, matrix)

    def set_bias(self, expert: int, projection: str, bias: Tensor) -> None:
        """See PlacedExperts."""
        self.weights.set_bias(expert, projection, bias)

    def take_channels(self, source: ExpertWeights, first: int = 0) -> None:
        """See PlacedExperts."""
        self.weights.take_channels(self._engine, source, first)

    def take_experts(self, source: ExpertWeights, experts: Sequence[int]) -> None:
        """See PlacedExperts."""
        self.weights.take_experts(self._engine, source, experts)

    def unpack(self, expert: int, projection: str) -> Tensor:
        """See PlacedExperts."""
        return self.weights.unpack(expert, projection)

    def _forward(
        self, call: Call, inputs: Inputs, keep: bool, out_TD: Tensor
    ) -> tuple[tuple[Tensor, ...], BlockReport]:
        _, kept, report = forward(self._engine, self.weights, call, inputs, keep, out_TD)
        return kept.tensors() if kept else (), report

    def _backward(
        self,
        call: Call,
        inputs: Inputs,
        d_out_TD: Tensor,
        kept: tuple[Tensor, ...],
        into: tuple[Tensor, Tensor],
    ) -> tuple[LoraGradients, BlockReport]:
        found, report = backward(
            self._engine, self.weights, call, inputs, d_out_TD, Kept(*kept), into
        )
        return found.lora, report


class CpuEngine:
    """Implements ExpertsEngine."""

    needs_copies = False

    def __init__(self, packer: Engine) -> None:
        self.packer = packer

    def __deepcopy__(self, memo: dict[int, Any]) -> CpuEngine:
        return self

    @property
    def isa(self) -> str:
        """See ExpertsEngine."""
        return self.packer.isa

    @property
    def threads(self) -> int:
        """See ExpertsEngine; the caller's is one of them."""
        return self.packer.threads

    @property
    def cached_bytes(self) -> int:
        """See ExpertsEngine."""
        return self.packer.cached_bytes

    def trim(self) -> int:
        """See ExpertsEngine."""
        return self.packer.trim()

    def new_experts(self, layout: WeightLayout) -> CpuExperts:
        """See ExpertsEngine."""
        return CpuExperts(self.packer, ExpertWeights(layout))

    def on(self, weights: ExpertWeights) -> CpuExperts:
        """See ExpertsEngine."""
        return CpuExperts(self.packer, weights)
