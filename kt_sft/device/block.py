"""Forward and backward of some of a layer's experts on the device of their inputs.

Products are in bf16 for hidden states of 16 bits and in fp32 for others, what lies between them in
fp32. Weights come in pieces of a few experts, and rows in parts, so that working memory is bounded
however many experts and rows there are.

Legend: T tokens, D hidden size, F intermediate size, K top-k, n experts of a piece, M rows of a
part, R all rows, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kt_sft.device import gates
from kt_sft.device.bringing import bring
from kt_sft.device.dropout import dropped
from kt_sft.device.packed import PackedPiece, unpacked_bytes
from kt_sft.device.products import Groups, outer, times
from kt_sft.device.routing import Routing
from kt_sft.kernels import PROJECTIONS, Call, Inputs, LoraFactors, WeightLayout

# Of weights that are unpacked, rows that are computed, and results that wait, a third each.
WORKING_BYTES = 768 << 20
# Ranks are padded to a multiple, which is what grouped products take.
_RANK_STEP = 8

# dA [experts, r, inputs] and dB [experts, outputs, r] of gate, up and down, fp32, or None.
LoraGradients = tuple[tuple[Tensor, Tensor] | None, ...]


@dataclass(frozen=True)
class Limits:
    """How much is computed at a time: experts whose weights are unpacked, rows of theirs, and rows
    whose results wait to be summed to their tokens. Sums are made in another order with others."""

    experts: int
    rows: int
    waiting: int

    @classmethod
    def within(
        cls, layout: WeightLayout, dtype: torch.dtype, nbytes: int = WORKING_BYTES
    ) -> Limits:
        """For about so many bytes, though for one expert and one row at least."""
        size, third = dtype.itemsize, nbytes // 3
        hidden, inner = layout.hidden, layout.intermediate
        unpacked = size * layout.weight_count // layout.experts
        # x, its gradient, and copies of both for LoRA; pre-activations, h, their gradients, too.
        row = 2 * ((4 * size + 8) * hidden + (4 * size + 32) * inner)
        rows = max(1, third // row)
        return cls(
            min(layout.experts, max(1, third // (unpacked + unpacked_bytes(layout)))),
            rows,
            max(rows, third // (size * hidden)),
        )


def compute_dtype(hidden: torch.dtype) -> torch.dtype:
    """In which products are made."""
    return torch.float32 if hidden == torch.float32 else torch.bfloat16


class Gradients(NamedTuple):
    """Of hidden [T, D], weight [T, K], and of LoRA, for the experts in their order, or for what all
    share; fp32."""

    hidden_TD: Tensor
    weight_TK: Tensor
    lora: LoraGradients


@dataclass(frozen=True)
class _Piece:
    """A piece's weights, and the LoRA factors of its experts, for all of its parts."""

    packed: PackedPiece
    lora: dict[str, tuple[Tensor, Tensor, float]]  # a [n, r, C], b [n, N, r], scaling
    dtype: torch.dtype
    _unpacked: dict[str, Tensor] = field(default_factory=dict)

    def weights(self, projection: str) -> Tensor:
        """[n, N, C], unpacked once."""
        if projection not in self._unpacked:
            self._unpacked[projection] = self.packed.weights(projection, self.dtype)
        return self._unpacked[projection]


@dataclass(frozen=True)
class _Part:
    """Some rows of a piece. slots: token * K + choice of each."""

    block: DeviceBlock
    piece: _Piece
    groups: Groups
    slots_M: Tensor

    def seen(self, projection: str, x_MC: Tensor) -> Tensor:
        """What LoRA of a projection sees of its input, and the way back for gradients."""
        return dropped(self.block.call, self.slots_M, projection, x_MC)

    def lora_down(self, projection: str, seen_MC: Tensor) -> Tensor:
        """scaling * x~ A' [M, r]."""
        a, _, scaling = self.piece.lora[projection]
        return scaling * times(seen_MC, a.transpose(1, 2), self.groups)

    def linear(self, projection: str, x_MC: Tensor) -> Tensor:
        """W x + bias + LoRA, [M, N]."""
        y_MN = times(x_MC, self.piece.weights(projection).transpose(1, 2), self.groups)
        bias = self.piece.packed.bias(projection)
        if bias is not None:
            y_MN = y_MN.float() + self.groups.spread(bias)
        if projection in self.piece.lora:
            _, b, _ = self.piece.lora[projection]
            p_Mr = self.lora_down(projection, self.seen(projection, x_MC))
            y_MN = y_MN.float() + times(p_Mr, b.transpose(1, 2), self.groups)
        return y_MN

    def inner(self, x_MD: Tensor) -> tuple[Tensor, ...]:
        """Outputs of gate, if there is one, and up, [M, F]."""
        return tuple(self.linear(name, x_MD) for name in self.piece.packed.layout.projections[:-1])

    def linear_backward(
        self, projection: str, d_y_MN: Tensor, d_lora: _LoraSums, x_MC: Tensor, weight_M1: Tensor
    ) -> Tensor:
        """The gradient of the input, fp32 [M, C]; those of LoRA are added to `d_lora`.

        weight_M1: a factor of d_y that only they have, as the input's gradient gets it later.
        """
        d_x_MC = times(d_y_MN, self.piece.weights(projection), self.groups).float()
        if projection not in self.piece.lora:
            return d_x_MC
        a, b, scaling = self.piece.lora[projection]
        seen_MC = self.seen(projection, x_MC)
        p_Mr, q_Mr = (
            self.lora_down(projection, seen_MC),
            scaling * times(d_y_MN, b, self.groups),
        )
        d_lora.add(
            projection,
            outer((weight_M1 * q_Mr).to(seen_MC.dtype), seen_MC, self.groups),
            outer(d_y_MN, (weight_M1 * p_Mr).to(d_y_MN.dtype), self.groups),
        )
        return d_x_MC + self.seen(projection, times(q_Mr, a, self.groups))

    def down_backward(
        self, inner: tuple[Tensor, ...], d_y_MD: Tensor, d_lora: _LoraSums, weight_M1: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradients of the routing weights [M] and of what `inner` returns, by projection."""
        block, packed = self.block, self.piece.packed
        h_MF = gates.apply(block.call.gate, inner)
        # Without the routing weight, whose own gradient is <d_h, h>.
        d_h_MF = self.linear_backward("down_proj", d_y_MD, d_lora, h_MF.to(block.dtype), weight_M1)
        d_weight_M = (d_h_MF * h_MF).sum(1)
        bias = packed.bias("down_proj")
        if bias is not None:
            d_weight_M += (d_y_MD.float() * self.groups.spread(bias)).sum(1)
        d_inner = gates.backward(block.call.gate, inner, weight_M1 * d_h_MF)
        return d_weight_M, dict(zip(packed.layout.projections, d_inner, strict=False))


@dataclass(frozen=True)
class DeviceBlock:
    """Some of a layer's experts, in an order, and the rows that they get in one pass.

    inputs: on the device, LoRA wherever it is. order: the experts; counts: the rows of each, which
    the host knows.
    """

    layout: WeightLayout
    call: Call
    inputs: Inputs
    order: Sequence[int]
    counts: Sequence[int]
    limits: Limits

    @cached_property
    def routing(self) -> Routing:
        """Of these experts."""
        return Routing.of(self.inputs.index_TK, self.order, self.counts)

    @property
    def dtype(self) -> torch.dtype:
        """Of products."""
        return compute_dtype(self.inputs.hidden_TD.dtype)

    @property
    def adapted(self) -> dict[str, LoraFactors]:
        """Projection -> its LoRA, where it has one."""
        return {p: f for p, f in zip(PROJECTIONS, self.inputs.lora, strict=True) if f is not None}

    @cached_property
    def _factors(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """LoRA of all these experts as it is multiplied: brought here once in a pass."""
        device, found = self.inputs.hidden_TD.device, {}
        for name, f in self.adapted.items():
            pad = -f.rank % _RANK_STEP
            a, b = (bring(_of_experts(t, self.order).to(self.dtype), device) for t in (f.a, f.b))
            found[name] = F.pad(a, (0, 0, 0, pad)), F.pad(b, (0, pad)), f.scaling
        return found

    def _piece(self, begin: int, packed: PackedPiece) -> _Piece:
        own = slice(begin, begin + len(packed))
        lora = {name: (a[own], b[own], scaling) for name, (a, b, scaling) in self._factors.items()}
        return _Piece(packed, lora, self.dtype)

    def _parts(self, begin: int, piece: _Piece) -> Iterator[tuple[int, _Part]]:
        """The rows of a piece, few at a time, and where they begin."""
        begins = self.routing.begins
        first, last = begins[begin], begins[begin + len(piece.packed)]
        for start in range(first, last, self.limits.rows):
            end = min(last, start + self.limits.rows)
            cuts = [min(max(b, start), end) for b in begins[begin : begin + len(piece.packed) + 1]]
            counts = [b - a for a, b in pairwise(cuts)]
            groups = Groups.of(counts, self.inputs.hidden_TD.device)
            yield start, _Part(self, piece, groups, self.routing.slot_of_row[start:end])

    def forward(self, pieces: Iterable[tuple[int, PackedPiece]]) -> Tensor:
        """Their share of out, fp32 [T, D].

        pieces: of the experts in their order, and where in it each begins. Nothing is kept for
        backward, which costs little to compute again and memory to keep.
        """
        hidden_TD = self.inputs.hidden_TD
        waiting = _Waiting(self, self.inputs.weight_TK.float())
        for begin, packed in pieces:
            piece = self._piece(begin, packed)
            for row, part in self._parts(begin, piece):
                tokens_M = self.routing.tokens(row, row + part.groups.rows)
                inner = part.inner(hidden_TD[tokens_M].to(self.dtype))
                h_MF = gates.apply(self.call.gate, inner).to(self.dtype)
                waiting.add(row, part.linear("down_proj", h_MF))
        return waiting.total()

    def backward(self, pieces: Iterable[tuple[int, PackedPiece]], d_out_TD: Tensor) -> Gradients:
        """The share of these experts."""
        hidden_TD, routing = self.inputs.hidden_TD, self.routing
        weight = self.inputs.weight_TK.float().flatten()
        d_weight = torch.zeros_like(weight)
        d_lora = _LoraSums(self)
        waiting = _Waiting(self)
        for begin, packed in pieces:
            piece = self._piece(begin, packed)
            d_lora.experts = slice(begin, begin + len(packed))
            for row, part in self._parts(begin, piece):
                tokens_M = routing.tokens(row, row + part.groups.rows)
                x_MD = hidden_TD[tokens_M].to(self.dtype)
                d_y_MD = d_out_TD[tokens_M].to(self.dtype)
                weight_M1 = weight[part.slots_M][:, None]
                d_weight[part.slots_M], d_inner = part.down_backward(
                    part.inner(x_MD), d_y_MD, d_lora, weight_M1
                )
                ones = torch.ones_like(weight_M1)
                d_x_MD = [
                    part.linear_backward(name, d.to(self.dtype), d_lora, x_MD, ones)
                    for name, d in d_inner.items()
                ]
                waiting.add(row, sum(d_x_MD[1:], start=d_x_MD[0]))
        return Gradients(
            waiting.total(), d_weight.view_as(self.inputs.weight_TK), d_lora.gradients()
        )


class _LoraSums:
    """The gradients of LoRA of all experts of a block, while their parts come.

    experts: whose parts are coming, by their places in the order.
    """

    def __init__(self, block: DeviceBlock) -> None:
        device, n = block.inputs.hidden_TD.device, len(block.order)
        self.experts = slice(0, 0)
        # What all experts share gets the sum of theirs.
        self._shared = {
            name for name, f in block.adapted.items() if len(f.a) < block.layout.experts
        }
        self._sums = {
            name: tuple(
                torch.zeros(
                    1 if name in self._shared else n,
                    *t.shape[1:],
                    dtype=torch.float32,
                    device=device,
                )
                for t in (f.a, f.b)
            )
            for name, f in block.adapted.items()
        }

    def add(self, projection: str, d_a: Tensor, d_b: Tensor) -> None:
        """Of one part; ranks may be padded."""
        a, b = self._sums[projection]
        if projection in self._shared:
            a += d_a[:, : a.shape[1]].sum(0, keepdim=True, dtype=a.dtype)
            b += d_b[:, :, : b.shape[2]].sum(0, keepdim=True, dtype=b.dtype)
            return
        a[self.experts] += d_a[:, : a.shape[1]]
        b[self.experts] += d_b[:, :, : b.shape[2]]

    def gradients(self) -> LoraGradients:
        """Of gate, up and down."""
        found = (self._sums.get(name) for name in PROJECTIONS)
        return tuple(None if pair is None else (pair[0], pair[1]) for pair in found)


class _Waiting:
    """Results of rows until they are summed to their tokens, by routing weights if given."""

    def __init__(self, block: DeviceBlock, weight_TK: Tensor | None = None) -> None:
        hidden_TD = block.inputs.hidden_TD
        self._routing, self._weight_TK = block.routing, weight_TK
        self._total_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
        size = min(block.limits.waiting, self._routing.rows)
        self._rows = hidden_TD.new_zeros(size + 1, hidden_TD.shape[1], dtype=block.dtype)
        self._first = self._count = self._come = 0

    def add(self, row: int, results: Tensor) -> None:
        """Of the rows from `row` on, which follow those before."""
        if self._count + len(results) > len(self._rows) - 1:
            self._sum()
        if not self._count:
            self._first = row
        self._rows[self._count : self._count + len(results)] = results
        self._count += len(results)
        self._come += len(results)

    def total(self) -> Tensor:
        """fp32 [T, D]. Raises RuntimeError where pieces were missing."""
        if self._come != self._routing.rows:
            raise RuntimeError(
                f"experts: {self._come} of {self._routing.rows} routed rows were computed"
            )
        self._sum()
        return self._total_TD

    def _sum(self) -> None:
        if self._count:
            self._rows[self._count] = 0
            rows = self._rows[: self._count + 1]
            self._routing.add_rows(self._total_TD, rows, self._first, self._weight_TK)
        self._count = 0


def _of_experts(factor: Tensor, experts: Sequence[int]) -> Tensor:
    """[n, ...] of a stacked factor, or of one that all share."""
    if len(factor) == 1:
        return factor.detach().expand(len(experts), *factor.shape[1:])
    index = torch.tensor(experts, dtype=torch.int64)
    return factor.detach().index_select(0, bring(index, factor.device))
