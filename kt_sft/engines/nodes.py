"""One engine per NUMA node, each with its own part of the intermediate channels.

A node holds rows of gate and up and columns of down, so that its threads read weights from their
own memory only. Its part of the layer is a layer with fewer intermediate channels; outputs and the
gradients of what the nodes share are sums over the nodes.

Legend: T tokens, D hidden size, F intermediate size, E experts, K top-k, r LoRA rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
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
    Lora,
    LoraFactors,
    WeightLayout,
    backward,
    forward,
)
from kt_sft.kernels._core import ForkedProcess

T = TypeVar("T")


def share_threads(threads: int, sizes: Sequence[int]) -> list[int]:
    """`threads` in proportion to the nodes' CPUs, by largest remainder; a node may get none."""
    exact = [threads * size / sum(sizes) for size in sizes]
    shares = [int(e) for e in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: threads - sum(shares)]:
        shares[i] += 1
    return shares


def split_channels(
    channels: int, shares: Sequence[int], granule: int = 64
) -> list[tuple[int, int]]:
    """Ranges in proportion to the nodes' threads that begin at multiples of `granule`.

    A range may be empty where there are fewer granules than nodes.
    """
    blocks = -(-channels // granule)
    reached = [0, *accumulate(shares)]
    cuts = [min(channels, round(blocks * r / reached[-1]) * granule) for r in reached]
    return list(pairwise(cuts))


class NodeExperts(HostExperts):
    """The experts of one layer, a range of intermediate channels on each node."""

    def __init__(self, engine: NodeEngines, layout: WeightLayout) -> None:
        super().__init__()
        self._layout = layout
        self._engine = engine
        cuts = split_channels(
            layout.intermediate, [node.threads for node in engine.nodes], layout.channel_granule
        )
        # Of few channels, some nodes get none.
        self._nodes = [i for i, (begin, end) in enumerate(cuts) if begin < end]
        self.ranges = [cuts[i] for i in self._nodes]
        # Down's bias is added on one node.
        self.parts = [
            ExpertWeights(layout.part(end - begin, down_bias=i == 0))
            for i, (begin, end) in enumerate(self.ranges)
        ]

    def _each(self, work: Callable[[int, Engine], T]) -> list[T]:
        """work(part, its node's engine) on the threads of the nodes, all at once."""
        return self._engine.on_nodes(
            lambda part: work(part, self._engine.nodes[self._nodes[part]]), self._nodes
        )

    @property
    def layout(self) -> WeightLayout:
        """See PlacedExperts."""
        return self._layout

    @property
    def nbytes(self) -> int:
        """On all nodes."""
        return sum(part.nbytes for part in self.parts)

    def pack(self, expert: int, projection: str, weight: Tensor) -> None:
        """See PlacedExperts; every node's threads write its part, so that it lies there."""

        def pack(part: int, engine: Engine) -> None:
            begin, end = self.ranges[part]
            cut = weight[:, begin:end] if projection == "down_proj" else weight[begin:end]
            self.parts[part].pack(engine, expert, projection, cut)

        self._each(pack)

    def pack_codes(self, expert: int, projection: str, matrix: CodedMatrix) -> None:
        """See PlacedExperts."""

        def pack(part: int, engine: Engine) -> None:
            begin, end = self.ranges[part]
            down = projection == "down_proj"
            cut = matrix.columns(begin, end) if down else matrix[begin:end]
            self.parts[part].pack_codes(engine, expert, projection, cut)

        self._each(pack)

    def set_bias(self, expert: int, projection: str, bias: Tensor) -> None:
        """See PlacedExperts."""
        if projection == "down_proj":
            self.parts[0].set_bias(expert, projection, bias)
            return
        for part, (begin, end) in zip(self.parts, self.ranges, strict=True):
            part.set_bias(expert, projection, bias[begin:end])

    def take_channels(self, source: ExpertWeights, first: int = 0) -> None:
        """See PlacedExperts."""
        self._each(
            lambda part, engine: self.parts[part].take_channels(
                engine, source, first + self.ranges[part][0]
            )
        )

    def take_experts(self, source: ExpertWeights, experts: Sequence[int]) -> None:
        """See PlacedExperts."""
        chosen = ExpertWeights(replace(source.layout, experts=len(experts)))
        chosen.take_experts(self._engine.packer, source, experts)
        self.take_channels(chosen)

    def unpack(self, expert: int, projection: str) -> Tensor:
        """See PlacedExperts."""
        dim = 1 if projection == "down_proj" else 0
        return torch.cat([part.unpack(expert, projection) for part in self.parts], dim)

    def _part(self, part: int, call: Call, inputs: Inputs) -> tuple[Call, Inputs]:
        """The call and inputs of one part."""
        begin, end = self.ranges[part]
        own = replace(inputs, lora=_cut_lora(inputs.lora, begin, end))
        return replace(call, first_channel=call.first_channel + begin), own

    def _forward(
        self, call: Call, inputs: Inputs, keep: bool, out_TD: Tensor
    ) -> tuple[tuple[Tensor, ...], BlockReport]:
        wide = replace(inputs, hidden_TD=inputs.hidden_TD.float())  # parts of a sum are not rounded
        found = self._each(
            lambda part, engine: forward(
                engine, self.parts[part], *self._part(part, call, wide), keep
            )
        )
        out_TD.copy_(_sum([out for out, _, _ in found]))
        kept = tuple(t for _, k, _ in found if k is not None for t in k.tensors())
        return kept, found[0][2]

    def _backward(
        self,
        call: Call,
        inputs: Inputs,
        d_out_TD: Tensor,
        kept: tuple[Tensor, ...],
        into: tuple[Tensor, Tensor],
    ) -> tuple[LoraGradients, BlockReport]:
        wide = replace(inputs, hidden_TD=inputs.hidden_TD.float())
        wide_d_out_TD, count = d_out_TD.float(), Kept.COUNT
        found = self._each(
            lambda part, engine: backward(
                engine,
                self.parts[part],
                *self._part(part, call, wide),
                wide_d_out_TD,
                Kept(*kept[part * count : (part + 1) * count]),
            )
        )
        parts = [gradients for gradients, _ in found]
        d_lora: list[tuple[Tensor, Tensor] | None] = []
        for which, factors in enumerate(inputs.lora):
            if factors is None:
                d_lora.append(None)
                continue
            own = [pair for pair in (part.lora[which] for part in parts) if pair is not None]
            d_a, d_b = [a for a, _ in own], [b for _, b in own]
            if which == 2:  # down: its inputs are split
                d_lora.append((torch.cat(d_a, 2), _sum(d_b)))
            else:  # gate and up: their outputs are
                d_lora.append((_sum(d_a), torch.cat(d_b, 1)))
        d_hidden_TD, d_weight_TK = into
        d_hidden_TD.copy_(_sum([part.hidden_TD for part in parts]))
        d_weight_TK.copy_(_sum([part.weight_TK for part in parts]))
        return tuple(d_lora), found[0][1]


class NodeEngines:
    """Implements ExpertsEngine; each node's calls run on a thread that is bound to the node."""

    needs_copies = True

    def __init__(
        self,
        nodes: Sequence[set[int]],
        threads: int,
        isa: str = "auto",
        *,
        cpu_flags: Mapping[str, bool] | None = None,
    ) -> None:
        """`nodes`: the CPUs of each; `threads` are shared out by their number."""
        self._owner = os.getpid()
        shares = share_threads(threads, [len(node) for node in nodes])
        used = [(cpus, share) for cpus, share in zip(nodes, shares, strict=True) if share]
        self._leaders = [
            ThreadPoolExecutor(1, f"kt-sft-node-{i}", os.sched_setaffinity, (0, cpus))
            for i, (cpus, _) in enumerate(used)
        ]
        # Made on the bound thread: the engine's own threads inherit its CPUs.
        self.nodes = self.on_nodes(
            lambda i: Engine(used[i][1], isa, cpu_flags=cpu_flags), range(len(used))
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NodeEngines:
        return self

    def on_nodes(self, work: Callable[[int], T], nodes: Sequence[int]) -> list[T]:
        """work(i) for each place i in `nodes`, on the thread of that node, all at once."""
        if os.getpid() != self._owner:
            raise ForkedProcess(
                "the experts' threads do not exist in a forked child; compute in the parent, or "
                "load the model in the child"
            )
        futures = [self._leaders[node].submit(work, i) for i, node in enumerate(nodes)]
        return [future.result() for future in futures]

    @property
    def isa(self) -> str:
        """See ExpertsEngine."""
        return self.nodes[0].isa

    @property
    def threads(self) -> int:
        """See ExpertsEngine; on all nodes."""
        return sum(node.threads for node in self.nodes)

    @property
    def cached_bytes(self) -> int:
        """See ExpertsEngine."""
        return sum(node.cached_bytes for node in self.nodes)

    @property
    def packer(self) -> Engine:
        """See ExpertsEngine; one node's."""
        return self.nodes[0]

    def trim(self) -> int:
        """See ExpertsEngine."""
        return sum(node.trim() for node in self.nodes)

    def new_experts(self, layout: WeightLayout) -> NodeExperts:
        """See ExpertsEngine; split over the nodes."""
        return NodeExperts(self, layout)

    def on(self, weights: ExpertWeights) -> NodeExperts:
        """See ExpertsEngine; nodes compute on copies."""
        placed = self.new_experts(weights.layout)
        placed.take_channels(weights)
        return placed


def _cut_lora(lora: Lora, begin: int, end: int) -> Lora:
    """The factors that a node's channels meet."""
    gate, up = (f and LoraFactors(f.a, f.b[:, begin:end].contiguous(), f.scaling) for f in lora[:2])
    f = lora[2]
    down = f and LoraFactors(f.a[:, :, begin:end].contiguous(), f.b, f.scaling)
    return gate, up, down


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """In the order of the nodes, so that results repeat."""
    total = tensors[0]
    for other in tensors[1:]:
        total = total + other
    return total
