"""The seam between the torch module and whatever computes its experts.

An engine places the experts of a layer, and what it placed computes: forward from tensors on any
device, backward from what forward left. Moving tensors to where it computes, and results back, is
the engine's own business; so are its threads, its memory, and how it parts the experts.

Legend: T tokens, D hidden size, K top-k, E experts, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kt_sft.engines.link import Arrival, Traffic
from kt_sft.kernels import (
    Call,
    CodedMatrix,
    Engine,
    ExpertWeights,
    Inputs,
    WeightLayout,
)
from kt_sft.scheduling.assignment import Assignment


@dataclass(frozen=True)
class Report:
    """What one call did.

    seconds: of computing, without moving tensors. finite: whether out, or the gradient of hidden,
    has neither NaN nor Inf. traffic: between the host and an accelerator. expert_rows: of a forward
    that was computed, the rows of each expert. device_rows: those of `rows` that an accelerator
    has computed.
    """

    rows: int
    max_rows: int
    seconds: float
    finite: bool
    traffic: Traffic = field(default_factory=Traffic)
    expert_rows: tuple[int, ...] = ()
    device_rows: int = 0


@dataclass(frozen=True)
class Home:
    """Where the gradient of a LoRA factor belongs: its device, dtype and first dimension.

    parameter: the factor, if it is one; what was made of several for this pass is not held.
    """

    device: torch.device
    dtype: torch.dtype
    copies: int
    parameter: nn.Parameter | None

    @classmethod
    def of(cls, factor: Tensor) -> Home:
        """Of a factor as given, empty ones too."""
        parameter = factor if isinstance(factor, nn.Parameter) else None
        return cls(factor.device, factor.dtype, len(factor), parameter)


@dataclass(frozen=True)
class Share:
    """What an accelerator computes of one pass. rows: of each expert of `places.on_device`."""

    places: Assignment
    rows: tuple[int, ...]

    def encoded(self, experts: int) -> Tensor:
        """int64 [2, E] on the host: each expert's place and rows.

        Autograd holds it with the other tensors: what is computed again may be parted otherwise.
        """
        found = torch.zeros(2, experts, dtype=torch.int64)
        found[0, list(self.places.resident)] = 1
        found[0, list(self.places.streamed)] = 2
        found[1, list(self.places.on_device)] = torch.tensor(self.rows, dtype=torch.int64)
        return found

    @classmethod
    def decoded(cls, encoded: Tensor) -> Share:
        """From `encoded`."""
        resident, streamed = (
            tuple((encoded[0] == code).nonzero().flatten().tolist()) for code in (1, 2)
        )
        places, rows = Assignment(resident, streamed), encoded[1].tolist()
        return cls(places, tuple(rows[e] for e in places.on_device))


@dataclass(frozen=True)
class Context:
    """What a forward leaves for its backward: the inputs where they were computed, and more.

    Autograd holds the tensors, so that it can free them: `replace(context, tensors=())` and back.
    weight_dtype: of the routing weights as given. share_tensors: how many at the end are for an
    accelerator's share.
    """

    call: Call
    scalings: tuple[float | None, ...]
    weight_dtype: torch.dtype
    lora: tuple[Home, ...]
    tensors: tuple[Tensor, ...]
    share_tensors: int = 0

    @property
    def inputs(self) -> Inputs:
        """Of the forward, where the engine computes."""
        return Inputs.of(self.tensors[: Inputs.NUMBER], self.scalings)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """What the engine kept of its arithmetic."""
        return self.tensors[Inputs.NUMBER :]


@dataclass(eq=False)
class Held:
    """A forward that a second run of the same layer may take over.

    In host memory, but for the out of a layer that an accelerator has a share of, which is there.
    """

    index_TK: Tensor
    out_TD: Tensor
    kept: tuple[Tensor, ...]
    share: Share | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        tensors = self.index_TK, self.out_TD, *self.kept
        return sum(t.nbytes for t in tensors if t.device.type == "cpu")


class Forward(NamedTuple):
    """The result of a forward: out [T, D] where hidden is.

    context: for backward, if it was to `keep`. held: for `resume`, if it was to `hold`.
    """

    out_TD: Tensor
    context: Context | None
    held: Held | None
    report: Report


class LayerGradients(NamedTuple):
    """Of hidden [T, D], weight [T, K], and (a, b) of gate, up and down, each where its tensor is.

    None where there is no LoRA, and for a gradient that waits.
    """

    hidden_TD: Tensor
    weight_TK: Tensor
    lora: tuple[Tensor | None, ...]


class PlacedExperts(Protocol):
    """The experts of one layer, where an engine has put them. A deep copy of a model shares them.

    Packing raises KernelArgumentError, and ValueError for NaN and Inf.
    """

    @property
    def layout(self) -> WeightLayout:
        """Of the whole layer."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weights take."""

    def pack(self, expert: int, projection: str, weight: Tensor) -> None:
        """Quantizes and packs one matrix [outputs, inputs] in fp32, bf16 or fp16."""

    def pack_codes(self, expert: int, projection: str, matrix: CodedMatrix) -> None:
        """Packs one matrix as published, in the coding of the layout, or in int8."""

    def set_bias(self, expert: int, projection: str, bias: Tensor) -> None:
        """Adds a frozen bias [outputs] to a projection that the layout has one for."""

    def take_channels(self, source: ExpertWeights, first: int = 0) -> None:
        """Copies the intermediate channels from `first` on."""

    def take_experts(self, source: ExpertWeights, experts: Sequence[int]) -> None:
        """Copies experts, one for each of these."""

    def unpack(self, expert: int, projection: str) -> Tensor:
        """The weights that are computed with, fp32 [outputs, inputs] on the CPU."""

    def send(self, inputs: Inputs) -> Arrival | None:
        """Begins to bring inputs to where they are computed with, for `forward` or `resume`."""

    def forward(
        self, call: Call, inputs: Inputs, arriving: Arrival | None, keep: bool, hold: bool = False
    ) -> Forward:
        """The weighted sum of each token's experts.

        arriving: what `send` returned. `keep`: a backward follows; `hold`: a second run, which
        `resume` can take over. Raises KernelArgumentError, and ValueError for an index outside
        0..E.
        """

    def resume(
        self, call: Call, inputs: Inputs, arriving: Arrival | None, held: Held
    ) -> Forward | None:
        """The same forward again, without computing it; None where its tokens went elsewhere."""

    def send_gradient(self, context: Context, d_out_TD: Tensor) -> Arrival | None:
        """As `send`, for `backward`."""

    def backward(
        self,
        context: Context,
        d_out_TD: Tensor,
        arriving: Arrival | None,
        lora_may_wait: bool = False,
    ) -> tuple[LayerGradients, Report]:
        """Gradients of the inputs, each where it belongs.

        arriving: what `send_gradient` returned. `lora_may_wait`: those of parameters elsewhere may
        be summed up here, until a call brings them; they are None meanwhile.
        """

    def forget_lora(self) -> None:
        """Takes LoRA for changed, whatever it looks like."""

    def forget_gradients(self) -> None:
        """Drops those that wait."""


class ExpertsEngine(Protocol):
    """What computes the experts of all layers of a model."""

    @property
    def isa(self) -> str:
        """The instruction set in use."""

    @property
    def threads(self) -> int:
        """Threads that compute."""

    @property
    def cached_bytes(self) -> int:
        """Bytes of temporary memory that are kept for the next call and not in use."""

    @property
    def packer(self) -> Engine:
        """The kernels and threads that pack a store of experts."""

    @property
    def needs_copies(self) -> bool:
        """Whether it computes on copies of its own only, never on a mapped file."""

    def trim(self) -> int:
        """Gives unused temporary memory back to the system; returns the bytes."""

    def new_experts(self, layout: WeightLayout) -> PlacedExperts:
        """Empty experts of one layer, to be packed."""

    def on(self, weights: ExpertWeights) -> PlacedExperts:
        """Experts that are packed already, computed where they lie."""
