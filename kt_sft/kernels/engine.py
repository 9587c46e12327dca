"""Forward and backward of one layer's routed experts on the CPU, over checked torch tensors."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

import kt_sft.kernels._core as _core
from kt_sft.errors import KernelArgumentError, ThreadsError
from kt_sft.kernels.checks import FLOAT_NAMES, address_of, refuse_pickling
from kt_sft.kernels.formats import (
    PROJECTIONS,
    WeightLayout,
)
from kt_sft.kernels.gate import Gate
from kt_sft.kernels.weights import ExpertWeights
from kt_sft.machine.cgroups import cgroup_folders

MAX_RANK = 512


def _round_up(n: int) -> int:
    return -(-n // 64) * 64


def _limits_of_threads() -> Iterator[str]:
    """What the system says that it allows."""
    for name, number in (
        ("processes of this user (ulimit -u)", resource.RLIMIT_NPROC),
        ("address space (ulimit -v)", resource.RLIMIT_AS),
    ):
        soft = resource.getrlimit(number)[0]
        if soft != resource.RLIM_INFINITY:
            yield f"{name} {soft}"
    for folder in cgroup_folders("pids"):
        try:
            limit = (folder / "pids.max").read_text().strip()
        except OSError:
            continue
        if limit != "max":
            yield f"{folder}/pids.max {limit}"


@dataclass(frozen=True)
class LoraFactors:
    """LoRA of one projection over all experts: a [E, r, inputs], b [E, outputs, r], fp32 on CPU."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[1]


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
        """COUNT of them, for autograd; Engine.kept is the way back."""
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


class Engine:
    """Threads, kernels and temporary memory, shared by all layers of a model.

    Calls from several Python threads are serialized; a call in a forked child raises
    ForkedProcess.
    """

    def __init__(
        self, threads: int, isa: str = "auto", *, cpu_flags: Mapping[str, bool] | None = None
    ) -> None:
        """`cpu_flags` stands in for the machine's own, in tests.

        Raises ThreadsError where the system does not give so many.
        """
        try:
            self.handle = _core.Engine(threads, isa, None if cpu_flags is None else dict(cpu_flags))
        except _core.ThreadsUnavailable as error:
            raise ThreadsError(
                f"threads: {error}; limits: {', '.join(_limits_of_threads()) or 'none that show'}. "
                "Set threads: to a smaller number, or raise the limit"
            ) from error

    def __deepcopy__(self, memo: dict) -> Engine:
        return self

    __reduce__ = refuse_pickling

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self.handle.isa

    @property
    def threads(self) -> int:
        """Threads that compute, the caller's included."""
        return self.handle.threads

    @property
    def cached_bytes(self) -> int:
        """Bytes of temporary memory that are kept for the next call and not in use."""
        return self.handle.cached_bytes

    def trim(self) -> int:
        """Gives unused temporary memory back to the system; returns the bytes."""
        return self.handle.trim()

    def new_weights(self, layout: WeightLayout) -> ExpertWeights:
        """Empty weights for this engine's calls."""
        return ExpertWeights(layout)

    @staticmethod
    def kept(tensors: Sequence[Tensor]) -> Kept:
        """From Kept.tensors()."""
        return Kept(*tensors)

    def empty(self, *shape: int) -> Tensor:
        """An fp32 tensor from the engine's reusable memory; contents undefined."""
        count = 1
        for n in shape:
            count *= n
        if count == 0:
            return torch.empty(shape, dtype=torch.float32)
        buffer = self.handle.buffer(4 * count)
        return torch.frombuffer(buffer, dtype=torch.float32, count=count).view(shape)

    def forward(
        self,
        weights: ExpertWeights,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        *,
        compute: str,
        gate: Gate,
        lora: Sequence[LoraFactors | None] = (None, None, None),
        dropout: float = 0.0,
        dropout_seed: int = 0,
        first_channel: int = 0,
        keep: bool = False,
    ) -> tuple[Tensor, Kept | None, BlockReport]:
        """out[t] = sum_k weight[t, k] * expert_{index[t, k]}(hidden[t]).

        hidden [T, D] fp32, bf16 or fp16; index [T, K] int64, E skips; weight [T, K] fp32.
        `first_channel`: where these intermediate channels begin in a layer that is split, so that
        dropout is that of the whole layer.
        Returns out [T, D] in the dtype of hidden, what backward needs if `keep`, and a report.
        Raises KernelArgumentError, and ValueError for an index outside 0..E.
        """
        call = self._call(
            weights,
            hidden_TD,
            index_TK,
            weight_TK,
            compute,
            gate,
            lora,
            dropout,
            dropout_seed,
            first_channel,
        )
        out_TD = torch.empty_like(hidden_TD)
        kept = None
        addresses: tuple = (0, 0, (0, 0, 0))
        if keep:
            rows, width = index_TK.numel(), _round_up(weights.intermediate)
            kept = Kept(
                self.empty(rows, width) if weights.gated else torch.empty(0),
                self.empty(rows, width),
                *(torch.empty(rows, f.rank) if f else torch.empty(0) for f in lora),
            )
            addresses = self._kept_addresses(kept, weights, rows, lora)
        report = self.handle.forward(*call, out_TD.data_ptr(), *addresses)
        return out_TD, kept, BlockReport(**report)

    def backward(
        self,
        weights: ExpertWeights,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        d_out_TD: Tensor,
        kept: Kept,
        *,
        compute: str,
        gate: Gate,
        lora: Sequence[LoraFactors | None] = (None, None, None),
        dropout: float = 0.0,
        dropout_seed: int = 0,
        first_channel: int = 0,
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor] | None], BlockReport]:
        """Gradients of `forward` for the same arguments.

        Returns d_hidden [T, D] in the dtype of hidden, d_weight [T, K] fp32, (d_a, d_b) fp32 for
        each LoRA, dense with zeros for idle experts, and a report.
        """
        call = self._call(
            weights,
            hidden_TD,
            index_TK,
            weight_TK,
            compute,
            gate,
            lora,
            dropout,
            dropout_seed,
            first_channel,
        )
        d_out = address_of(d_out_TD, "d_out", hidden_TD.shape, [hidden_TD.dtype])
        addresses = self._kept_addresses(kept, weights, index_TK.numel(), lora)
        d_hidden_TD = torch.empty_like(hidden_TD)
        d_weight_TK = torch.empty_like(weight_TK)
        d_lora = [(self.empty(*f.a.shape), self.empty(*f.b.shape)) if f else None for f in lora]
        report = self.handle.backward(
            *call,
            d_out,
            *addresses,
            d_hidden_TD.data_ptr(),
            d_weight_TK.data_ptr(),
            [(p[0].data_ptr(), p[1].data_ptr()) if p else (0, 0) for p in d_lora],
        )
        return d_hidden_TD, d_weight_TK, d_lora, BlockReport(**report)

    def _call(
        self,
        weights: ExpertWeights,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        compute: str,
        gate: Gate,
        lora: Sequence[LoraFactors | None],
        dropout: float,
        dropout_seed: int,
        first_channel: int,
    ) -> tuple:
        if hidden_TD.dim() != 2 or index_TK.dim() != 2:
            raise KernelArgumentError(
                f"hidden and index: got {hidden_TD.dim()} and {index_TK.dim()} dimensions, "
                "expected [T, D] and [T, K]"
            )
        # In fp32, as the kernels see it, a little less than 1 would be 1.
        if not 0.0 <= dropout <= 1.0 - 2.0**-24:
            raise KernelArgumentError(f"dropout: got {dropout}, expected 0 <= p < 1")
        if first_channel < 0:
            raise KernelArgumentError(f"first_channel: got {first_channel}, expected at least 0")
        tokens, top_k = index_TK.shape
        hidden = address_of(hidden_TD, "hidden", (tokens, weights.hidden), list(FLOAT_NAMES))
        index = address_of(index_TK, "index", (tokens, top_k), [torch.int64])
        weight = address_of(weight_TK, "weight", (tokens, top_k), [torch.float32])
        factors = []
        for projection, f in zip(PROJECTIONS, lora, strict=True):
            if f is None:
                factors.append((0, 0, 0, 0.0))
                continue
            outputs, inputs = weights.shape(projection)
            if not 1 <= f.rank <= MAX_RANK:
                raise KernelArgumentError(
                    f"{projection}: got rank {f.rank}, expected 1 to {MAX_RANK}"
                )
            if not math.isfinite(f.scaling):
                raise KernelArgumentError(f"{projection}: got scaling {f.scaling}")
            a = address_of(
                f.a, f"{projection} lora_A", (weights.experts, f.rank, inputs), [torch.float32]
            )
            b = address_of(
                f.b, f"{projection} lora_B", (weights.experts, outputs, f.rank), [torch.float32]
            )
            factors.append((f.rank, a, b, f.scaling))
        return (
            weights.handle,
            compute,
            gate.as_tuple(),
            tokens,
            top_k,
            FLOAT_NAMES[hidden_TD.dtype],
            hidden,
            index,
            weight,
            factors,
            dropout,
            dropout_seed,
            first_channel,
        )

    @staticmethod
    def _kept_addresses(
        kept: Kept, weights: ExpertWeights, rows: int, lora: Sequence[LoraFactors | None]
    ) -> tuple[int, int, list[int]]:
        shape = (rows, _round_up(weights.intermediate))
        fp32 = [torch.float32]
        return (
            address_of(kept.gate, "kept gate", shape, fp32) if weights.gated else 0,
            address_of(kept.up, "kept up", shape, fp32),
            [
                address_of(p, "kept LoRA product", (rows, f.rank), fp32) if f else 0
                for p, f in zip(kept.lora_down, lora, strict=True)
            ],
        )
