"""Forward and backward of one layer's routed experts: every tensor is checked before it is read.

Legend: T tokens, D hidden size, F intermediate size, E experts, K top-k, R = T*K routed rows,
r LoRA rank, Fp is F rounded up to a multiple of 64.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

import kt_sft.kernels._core as _core
from kt_sft.errors import KernelArgumentError
from kt_sft.kernels.checks import FLOAT_NAMES, address_of
from kt_sft.kernels.engine import Engine
from kt_sft.kernels.formats import PROJECTIONS, WeightLayout
from kt_sft.kernels.gate import Gate
from kt_sft.kernels.weights import ExpertWeights

MAX_RANK = 512
# Temporary bytes for the routed rows of a call, beyond which it takes some experts after the
# others. Every expert still gets all of its rows at once, so that this costs no speed.
AT_A_TIME = 2 << 30


@dataclass(frozen=True)
class Call:
    """What forward, recompute and backward of one pass through a layer share, besides tensors.

    compute: exact, int8 or bf16, as the weights' format allows. dropout: of LoRA's inputs, 0 <= p <
    1; its masks follow from the seed. first_channel: where these intermediate channels begin in a
    layer that is split, so that dropout is that of the whole layer. max_rows: routed rows that are
    computed at a time, those of one expert at least, 0 for all; temporary memory depends on it,
    results do not.
    """

    compute: str
    gate: Gate
    dropout: float = 0.0
    dropout_seed: int = 0
    first_channel: int = 0
    max_rows: int = 0


@dataclass(frozen=True)
class LoraFactors:
    """LoRA of one projection over all experts, fp32: a [E, r, inputs], b [E, outputs, r].

    A first dimension of 1 is one pair that all experts share.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[1]


Lora = tuple[LoraFactors | None, LoraFactors | None, LoraFactors | None]
NO_LORA: Lora = (None, None, None)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a forward: hidden [T, D] in fp32, bf16 or fp16; index [T, K] int64, where E
    skips; weight [T, K] fp32; LoRA of gate, up and down."""

    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    lora: Lora = NO_LORA

    @property
    def scalings(self) -> tuple[float | None, ...]:
        """Of each LoRA; None where there is none."""
        return tuple(f.scaling if f else None for f in self.lora)

    def tensors(self) -> tuple[Tensor, ...]:
        """NUMBER of them, empty where there is no LoRA; `of` is the way back."""
        empty = self.hidden_TD.new_empty(0)
        pairs = (((f.a, f.b) if f else (empty, empty)) for f in self.lora)
        return self.hidden_TD, self.index_TK, self.weight_TK, *(t for pair in pairs for t in pair)

    NUMBER: ClassVar[int] = 9

    @classmethod
    def of(cls, tensors: Sequence[Tensor], scalings: Sequence[float | None]) -> Inputs:
        """From `tensors()` and `scalings`."""
        hidden_TD, index_TK, weight_TK, *flat = tensors
        gate, up, down = (
            None if scaling is None else LoraFactors(flat[2 * i], flat[2 * i + 1], scaling)
            for i, scaling in enumerate(scalings)
        )
        return cls(hidden_TD, index_TK, weight_TK, (gate, up, down))


@dataclass(frozen=True)
class Gradients:
    """Of the inputs: hidden [T, D] in its dtype, weight [T, K] fp32, (a, b) of each LoRA in fp32.

    Those of LoRA are dense, zeros for idle experts, and [E, ...] even where one pair is shared.
    """

    hidden_TD: Tensor
    weight_TK: Tensor
    lora: tuple[tuple[Tensor, Tensor] | None, ...]


class Kept:
    """What forward keeps for backward, rows sorted by expert.

    gate: fp32 [R, Fp], [0] without a gate; up: fp32 [R, Fp]; lora_down: fp32 [R, r] each, [0] where
    there is no LoRA. In a forked child the memory is not there: ForkedProcess.
    """

    COUNT: ClassVar[int] = 5

    def __init__(self, gate: Tensor, up: Tensor, *lora_down: Tensor) -> None:
        self._tensors = gate, up, *lora_down
        self._owner = os.getpid()

    @property
    def gate(self) -> Tensor:
        """Pre-activations of the gate."""
        return self.tensors()[0]

    @property
    def up(self) -> Tensor:
        """Outputs of up."""
        return self.tensors()[1]

    @property
    def lora_down(self) -> tuple[Tensor, ...]:
        """x A^T of each projection."""
        return self.tensors()[2:]

    def tensors(self) -> tuple[Tensor, ...]:
        """COUNT of them, for autograd; Kept(*tensors) is the way back."""
        if os.getpid() != self._owner:
            raise _core.ForkedProcess(
                f"kept activations belong to process {self._owner} and are not in its forked child "
                f"{os.getpid()}; run backward in the parent"
            )
        return self._tensors


@dataclass
class BlockReport:
    """What one call did."""

    rows: int
    max_rows: int
    active_experts: int
    phase_ms: dict[str, float] = field(default_factory=dict)


def forward(
    engine: Engine,
    weights: ExpertWeights,
    call: Call,
    inputs: Inputs,
    keep: bool = False,
    out_TD: Tensor | None = None,
) -> tuple[Tensor, Kept | None, BlockReport]:
    """out[t] = sum_k weight[t, k] * expert_{index[t, k]}(hidden[t]).

    Returns out [T, D] in the dtype of hidden, what backward needs if `keep`, and a report.
    out_TD: where to write it. Raises KernelArgumentError, and ValueError for an index outside
    0..E.
    """
    native = _native(weights, call, inputs)
    out_TD = torch.empty_like(inputs.hidden_TD) if out_TD is None else out_TD
    out = address_of(out_TD, "out", inputs.hidden_TD.shape, [inputs.hidden_TD.dtype])
    kept = None
    addresses = _core.KeptActivations()
    if keep:
        rows, width = inputs.index_TK.numel(), _round_up(weights.intermediate)
        kept = Kept(
            engine.empty(rows, width) if weights.gated else torch.empty(0),
            engine.empty(rows, width),
            *(torch.empty(rows, f.rank) if f else torch.empty(0) for f in inputs.lora),
        )
        addresses = _kept_addresses(kept, weights, inputs)
    report = engine.handle.forward(native, out=out, kept=addresses)
    return out_TD, kept, BlockReport(**report)


def backward(
    engine: Engine,
    weights: ExpertWeights,
    call: Call,
    inputs: Inputs,
    d_out_TD: Tensor,
    kept: Kept,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Gradients, BlockReport]:
    """Gradients of `forward` for the same call and inputs. Raises KernelArgumentError.

    into: where to write those of hidden and weight.
    """
    native = _native(weights, call, inputs)
    hidden_TD = inputs.hidden_TD
    d_out = address_of(d_out_TD, "d_out", hidden_TD.shape, [hidden_TD.dtype])
    addresses = _kept_addresses(kept, weights, inputs)
    d_hidden_TD, d_weight_TK = into or (
        torch.empty_like(hidden_TD),
        torch.empty_like(inputs.weight_TK),
    )
    d_hidden = address_of(d_hidden_TD, "d_hidden", hidden_TD.shape, [hidden_TD.dtype])
    d_weight = address_of(d_weight_TK, "d_weight", inputs.weight_TK.shape, [torch.float32])
    d_lora = tuple(
        (
            engine.empty(weights.experts, *f.a.shape[1:]),
            engine.empty(weights.experts, *f.b.shape[1:]),
        )
        if f
        else None
        for f in inputs.lora
    )
    report = engine.handle.backward(
        native,
        d_out=d_out,
        kept=addresses,
        d_hidden=d_hidden,
        d_weight=d_weight,
        d_lora=[
            _core.LoraGradient(a=p[0].data_ptr(), b=p[1].data_ptr()) if p else _core.LoraGradient()
            for p in d_lora
        ],
    )
    return Gradients(d_hidden_TD, d_weight_TK, d_lora), BlockReport(**report)


def rows_by_expert(index_TK: Tensor, experts: int) -> tuple[int, ...]:
    """How many choices, on the host, name each expert. Raises ValueError outside 0..E."""
    wrong = (index_TK < 0) | (index_TK > experts)
    if wrong.any():
        token, choice = (int(n) for n in wrong.nonzero()[0])
        raise ValueError(
            f"top_k_index: token {token} names expert {int(index_TK[token, choice])}, expected 0 "
            f"to {experts - 1} (or {experts} to skip)"
        )
    return tuple(index_TK.flatten().bincount(minlength=experts + 1)[:experts].tolist())


def kept_bytes(layout: WeightLayout, rows: int, ranks: Sequence[int]) -> int:
    """Of what forward keeps for `rows` rows, with LoRA of these ranks."""
    channels = (2 if layout.gated else 1) * _round_up(layout.intermediate)
    return 4 * rows * (channels + sum(ranks))


def backward_bytes(
    layout: WeightLayout,
    compute: str,
    tokens: int,
    top_k: int,
    dtype: torch.dtype,
    ranks: Sequence[int],
    *,
    shared: bool,
    isa: str,
    threads: int,
    max_rows: int = 0,
) -> int:
    """Temporary memory of a backward, which takes more than a forward; the core counts it.

    dtype: of hidden. ranks: of the LoRA of gate, up and down, 0 without; shared: by all experts.
    max_rows: of the call. isa: any there is, of this machine or not. The gradients of LoRA are not
    among it.
    """
    return _core.backward_bytes(
        isa=isa,
        threads=threads,
        layout=layout.native,
        compute=layout.arithmetic or compute,
        tokens=tokens,
        top_k=top_k,
        dtype=FLOAT_NAMES[dtype],
        ranks=list(ranks),
        shared=shared,
        max_rows=max_rows,
    )


def rows_within(layout: WeightLayout, compute: str, nbytes: int = AT_A_TIME) -> int:
    """How many routed rows a backward can take at a time in about so much temporary memory."""
    hidden, width = _round_up(layout.hidden), _round_up(layout.intermediate)
    inner = 2 * width if layout.gated else width
    packed = (1 if (layout.arithmetic or compute) == "int8" else 2) * (hidden + inner)
    return max(1, nbytes // (packed + 4 * (inner + hidden + width)))


def _round_up(n: int) -> int:
    return -(-n // 64) * 64


def _native(weights: ExpertWeights, call: Call, inputs: Inputs) -> _core.BlockInput:
    """The call for the compiled core, once everything in it is what the kernels read."""
    hidden_TD, index_TK = inputs.hidden_TD, inputs.index_TK
    if hidden_TD.dim() != 2 or index_TK.dim() != 2:
        raise KernelArgumentError(
            f"hidden and index: got {hidden_TD.dim()} and {index_TK.dim()} dimensions, "
            "expected [T, D] and [T, K]"
        )
    # In fp32, as the kernels see it, a little less than 1 would be 1.
    if not 0.0 <= call.dropout <= 1.0 - 2.0**-24:
        raise KernelArgumentError(f"dropout: got {call.dropout}, expected 0 <= p < 1")
    for name, value in (("first_channel", call.first_channel), ("max_rows", call.max_rows)):
        if value < 0:
            raise KernelArgumentError(f"{name}: got {value}, expected at least 0")
    tokens, top_k = index_TK.shape
    return _core.BlockInput(
        weights=weights.handle,
        compute=call.compute,
        gate=call.gate.native,
        tokens=tokens,
        top_k=top_k,
        hidden=address_of(hidden_TD, "hidden", (tokens, weights.hidden), list(FLOAT_NAMES)),
        dtype=FLOAT_NAMES[hidden_TD.dtype],
        index=address_of(index_TK, "index", (tokens, top_k), [torch.int64]),
        routing_weight=address_of(inputs.weight_TK, "weight", (tokens, top_k), [torch.float32]),
        lora=[
            _native_lora(weights, projection, factors)
            for projection, factors in zip(PROJECTIONS, inputs.lora, strict=True)
        ],
        dropout=call.dropout,
        dropout_seed=call.dropout_seed,
        first_channel=call.first_channel,
        max_rows=call.max_rows,
    )


def _native_lora(weights: ExpertWeights, projection: str, f: LoraFactors | None) -> _core.Lora:
    if f is None:
        return _core.Lora()
    outputs, inputs = weights.shape(projection)
    if not 1 <= f.rank <= MAX_RANK:
        raise KernelArgumentError(f"{projection}: got rank {f.rank}, expected 1 to {MAX_RANK}")
    if not math.isfinite(f.scaling):
        raise KernelArgumentError(f"{projection}: got scaling {f.scaling}")
    shared = f.a.shape[0] == 1
    experts = 1 if shared else weights.experts
    fp32 = [torch.float32]
    return _core.Lora(
        rank=f.rank,
        a=address_of(f.a, f"{projection} lora_A", (experts, f.rank, inputs), fp32),
        b=address_of(f.b, f"{projection} lora_B", (experts, outputs, f.rank), fp32),
        scaling=f.scaling,
        shared=shared,
    )


def _kept_addresses(kept: Kept, weights: ExpertWeights, inputs: Inputs) -> _core.KeptActivations:
    rows = inputs.index_TK.numel()
    shape = (rows, _round_up(weights.intermediate))
    fp32 = [torch.float32]
    return _core.KeptActivations(
        gate=address_of(kept.gate, "kept gate", shape, fp32) if weights.gated else 0,
        up=address_of(kept.up, "kept up", shape, fp32),
        lora_down=[
            address_of(p, "kept LoRA product", (rows, f.rank), fp32) if f else 0
            for p, f in zip(kept.lora_down, inputs.lora, strict=True)
        ],
    )
