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
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from kt_sft.kernels._core import ForkedProcess
from kt_sft.kernels.engine import BlockReport, Engine, Kept, LoraFactors
from kt_sft.kernels.formats import CodedMatrix, WeightLayout
from kt_sft.kernels.weights import ExpertWeights

T = TypeVar("T")


def engine_on(cpus: set[int], threads: int, isa: str = "auto") -> Engine:
    """An engine whose own threads stay on some CPUs; the calling thread is left alone."""
    with ThreadPoolExecutor(1, "kt-sft-bound", os.sched_setaffinity, (0, cpus)) as bound:
        return bound.submit(Engine, threads, isa).result()


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


class SplitWeights:
    """The weights of one layer, a range of intermediate channels on each node."""

    def __init__(self, engines: NodeEngines, layout: WeightLayout) -> None:
        self.layout = layout
        cuts = split_channels(
            layout.intermediate, [node.threads for node in engines.nodes], layout.channel_granule
        )
        # Of few channels, some nodes get none.
        self.nodes = [i for i, (begin, end) in enumerate(cuts) if begin < end]
        self.ranges = [cuts[i] for i in self.nodes]
        # Down's bias is added on one node.
        self.parts = [
            ExpertWeights(layout.part(end - begin, down_bias=i == 0))
            for i, (begin, end) in enumerate(self.ranges)
        ]

    def __deepcopy__(self, memo: dict) -> SplitWeights:
        return self

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
        """F, of all nodes together."""
        return self.layout.intermediate

    @property
    def gated(self) -> bool:
        """Whether there is a gate projection."""
        return self.layout.gated

    @property
    def nbytes(self) -> int:
        """Bytes of host memory on all nodes."""
        return sum(part.nbytes for part in self.parts)

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections that these experts have, in order."""
        return self.parts[0].projections

    def shape(self, projection: str) -> tuple[int, int]:
        """(outputs, inputs) of one expert's projection, all nodes together."""
        return self.layout.shape(projection)

    def pack(self, engine: NodeEngines, expert: int, projection: str, weight: Tensor) -> None:
        """As ExpertWeights.pack; every node's threads write its part, so that it lies there."""
        engine.on_nodes(
            lambda part: self.parts[part].pack(
                engine.nodes[self.nodes[part]],
                expert,
                projection,
                self._cut(projection, weight, part),
            ),
            self.nodes,
        )

    def pack_codes(
        self, engine: NodeEngines, expert: int, projection: str, matrix: CodedMatrix
    ) -> None:
        """As ExpertWeights.pack_codes."""

        def pack(part: int) -> None:
            begin, end = self.ranges[part]
            down = projection == "down_proj"
            cut = matrix.columns(begin, end) if down else matrix[begin:end]
            self.parts[part].pack_codes(engine.nodes[self.nodes[part]], expert, projection, cut)

        engine.on_nodes(pack, self.nodes)

    def take_channels(self, engine: NodeEngines, source: ExpertWeights, first: int) -> None:
        """As ExpertWeights.take_channels; every node's threads write its part."""
        engine.on_nodes(
            lambda part: self.parts[part].take_channels(
                engine.nodes[self.nodes[part]], source, first + self.ranges[part][0]
            ),
            self.nodes,
        )

    def unpack(self, expert: int, projection: str) -> Tensor:
        """The weights that the kernels compute with, fp32 [outputs, inputs]."""
        dim = 1 if projection == "down_proj" else 0
        return torch.cat([part.unpack(expert, projection) for part in self.parts], dim)

    def set_bias(self, expert: int, projection: str, bias: Tensor) -> None:
        """As ExpertWeights.set_bias; down's is added on one node."""
        if projection == "down_proj":
            self.parts[0].set_bias(expert, projection, bias)
            return
        for part, (begin, end) in zip(self.parts, self.ranges, strict=True):
            part.set_bias(expert, projection, bias[begin:end])

    def _cut(self, projection: str, weight: Tensor, part: int) -> Tensor:
        begin, end = self.ranges[part]
        return weight[:, begin:end] if projection == "down_proj" else weight[begin:end]


class SplitKept:
    """What forward keeps for backward, of each node."""

    def __init__(self, parts: Sequence[Kept]) -> None:
        self.parts = list(parts)

    def tensors(self) -> tuple[Tensor, ...]:
        """Flat, for autograd."""
        return tuple(t for part in self.parts for t in part.tensors())


class NodeEngines:
    """Has the face of Engine; each node's calls run on a thread that is bound to the node."""

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

    def __deepcopy__(self, memo: dict) -> NodeEngines:
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
        """The instruction set in use."""
        return self.nodes[0].isa

    @property
    def threads(self) -> int:
        """Threads that compute, on all nodes."""
        return sum(node.threads for node in self.nodes)

    @property
    def cached_bytes(self) -> int:
        """Bytes of temporary memory that are kept for the next call and not in use."""
        return sum(node.cached_bytes for node in self.nodes)

    def trim(self) -> int:
        """Gives unused temporary memory back to the system; returns the bytes."""
        return sum(node.trim() for node in self.nodes)

    def new_weights(self, layout: WeightLayout) -> SplitWeights:
        """Empty weights, split over the nodes."""
        return SplitWeights(self, layout)

    @staticmethod
    def kept(tensors: Sequence[Tensor]) -> SplitKept:
        """From SplitKept.tensors()."""
        width = Kept.COUNT
        return SplitKept(
            [Engine.kept(tensors[i : i + width]) for i in range(0, len(tensors), width)]
        )

    def forward(
        self,
        weights: SplitWeights,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        *,
        lora: Sequence[LoraFactors | None] = (None, None, None),
        keep: bool = False,
        **arguments: Any,
    ) -> tuple[Tensor, SplitKept | None, BlockReport]:
        """As Engine.forward."""
        wide_TD = hidden_TD.float()
        parts = self.on_nodes(
            lambda i: self.nodes[weights.nodes[i]].forward(
                weights.parts[i],
                wide_TD,
                index_TK,
                weight_TK,
                lora=_cut_lora(lora, weights.ranges[i]),
                keep=keep,
                first_channel=weights.ranges[i][0],
                **arguments,
            ),
            weights.nodes,
        )
        out_TD = _sum([out for out, _, _ in parts]).to(hidden_TD.dtype)
        kept = SplitKept([k for _, k, _ in parts if k is not None]) if keep else None
        return out_TD, kept, parts[0][2]

    def backward(
        self,
        weights: SplitWeights,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        d_out_TD: Tensor,
        kept: SplitKept,
        *,
        lora: Sequence[LoraFactors | None] = (None, None, None),
        **arguments: Any,
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor] | None], BlockReport]:
        """As Engine.backward."""
        wide_TD, wide_d_out_TD = hidden_TD.float(), d_out_TD.float()
        parts = self.on_nodes(
            lambda i: self.nodes[weights.nodes[i]].backward(
                weights.parts[i],
                wide_TD,
                index_TK,
                weight_TK,
                wide_d_out_TD,
                kept.parts[i],
                lora=_cut_lora(lora, weights.ranges[i]),
                first_channel=weights.ranges[i][0],
                **arguments,
            ),
            weights.nodes,
        )
        d_lora: list[tuple[Tensor, Tensor] | None] = []
        for which, factors in enumerate(lora):
            if factors is None:
                d_lora.append(None)
                continue
            own = [pair for pair in (part[2][which] for part in parts) if pair is not None]
            d_a, d_b = [a for a, _ in own], [b for _, b in own]
            if which == 2:  # down: its inputs are split
                d_lora.append((torch.cat(d_a, 2), _sum(d_b)))
            else:  # gate and up: their outputs are
                d_lora.append((_sum(d_a), torch.cat(d_b, 1)))
        d_hidden_TD = _sum([part[0] for part in parts]).to(hidden_TD.dtype)
        return d_hidden_TD, _sum([part[1] for part in parts]), d_lora, parts[0][3]


def _cut_lora(
    lora: Sequence[LoraFactors | None], channels: tuple[int, int]
) -> list[LoraFactors | None]:
    """The factors that a node's channels meet."""
    begin, end = channels
    cut: list[LoraFactors | None] = []
    for which, f in enumerate(lora):
        if f is None:
            cut.append(None)
        elif which == 2:
            cut.append(LoraFactors(f.a[:, :, begin:end].contiguous(), f.b, f.scaling))
        else:
            cut.append(LoraFactors(f.a, f.b[:, begin:end].contiguous(), f.scaling))
    return cut


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """In the order of the nodes, so that results repeat."""
    total = tensors[0]
    for other in tensors[1:]:
        total = total + other
    return total
