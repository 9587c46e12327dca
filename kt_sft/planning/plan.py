"""How much memory a run will take, by component, before any weight is read.

Legend: T tokens of a micro batch, K top-k, D hidden size, F intermediate size, r LoRA rank, E
experts, R = T * K rows. What is not ours (the activations of the other layers) is estimated.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kt_sft.engines.link import BUFFERS, pinned_size
from kt_sft.engines.share import device_bytes
from kt_sft.errors import MemoryPlanError
from kt_sft.kernels import (
    PROJECTIONS,
    WeightLayout,
    backward_bytes,
    kept_bytes,
    rows_within,
)

logger = logging.getLogger(__name__)

_FLOAT = 4
_STATES = 4  # of a trained parameter in fp32: itself, its gradient, two of Adam
# Tensors of [T, D] that a layer's attention, norms and shared parts hold for backward, and those
# that come and go within its backward; and fp32 copies of the logits. By scripts/memory_plan.py.
_HELD_TENSORS, _PASSING_TENSORS = 13, 11
_LOGIT_COPIES = 2
# Of scores, with sinks, softmax and its result, and their gradients, by reading what computes them.
_SQUARES = 6
_RESIDENT = "resident experts"
# Without a training nobody says how long a prompt is.
_FORWARD_TOKENS = 4096
# Not handed out: what the system and the allocator's slack take.
_MARGIN_BYTES = 512 << 20
_MARGIN_SHARE = 0.03


@dataclass(frozen=True)
class Workload:
    """A training as far as memory depends on it.

    tokens: of one micro batch at most. rank: of the LoRA on the experts, 0 without; other_trained:
    parameters that train beside the experts. checkpointing: gradient checkpointing is on.
    frozen_models: reference and reward models that are loaded too, taken to be as large.
    accumulates: a step has several micro batches. offloads: checkpointing holds the layers' inputs
    in host memory (use_unsloth_gc). fused_loss: logits are made and used in pieces
    (enable_liger_kernel). eager: attention makes matrices of `length` by `length` tokens.
    """

    tokens: int
    rank: int
    checkpointing: bool = True
    other_trained: int = 0
    frozen_models: int = 0
    accumulates: bool = False
    offloads: bool = False
    fused_loss: bool = False
    length: int = 0
    eager: bool = False


@dataclass(frozen=True)
class LayerNeeds:
    """One layer of experts: its packed form, experts per token, and its LoRA.

    adapted: the projections that get LoRA where the workload has a rank. shared_lora: one pair of
    factors for all experts.
    """

    layout: WeightLayout
    top_k: int
    shared_lora: bool = False
    adapted: tuple[str, ...] = PROJECTIONS

    @property
    def factors(self) -> tuple[str, ...]:
        """The adapted ones of the projections that these experts have."""
        return tuple(p for p in self.layout.projections if p in self.adapted)


@dataclass(frozen=True)
class RestOfModel:
    """The parameters beside the routed experts, in bytes, and what its activations depend on.

    host_bytes: of those that are on the host by a setting. heads: of the attention.
    """

    nbytes: int
    hidden: int
    layers: int
    vocabulary: int
    element_bytes: int
    on_host: bool
    host_bytes: int = 0
    heads: int = 0


@dataclass(frozen=True)
class Arithmetic:
    """How the experts are computed: compute of the settings, instruction set, threads."""

    compute: str
    isa: str
    threads: int


@dataclass(frozen=True)
class OnDevice:
    """The experts that an accelerator computes. resident_bytes: of those that stay there."""

    resident_bytes: int = 0


@dataclass(frozen=True)
class Component:
    """A part of the memory: `place` is machine (once for all its ranks), host or device."""

    name: str
    place: str
    nbytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """The components of one rank's run, and how many ranks share the machine.

    layers, work: what it is of. adapters: where the experts' LoRA is, host or device. keeps: what
    the experts compute in a checkpointed layer is held until backward. two_layers: bytes of the two
    largest layers' experts.
    """

    components: tuple[Component, ...]
    ranks: int
    adapters: str = "device"
    keeps: bool = True
    two_layers: int = 0
    layers: tuple[LayerNeeds, ...] = ()
    work: Workload | None = None

    def of(self, place: str) -> int:
        """Bytes that one rank takes in a place."""
        return sum(c.nbytes for c in self.components if c.place == place)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory for all ranks of the machine."""
        return self.of("machine") + self.ranks * self.of("host")

    def text(self) -> str:
        """A line for each component."""
        times = {"host": f", {self.ranks} ranks" if self.ranks > 1 else ""}
        lines = [
            f"  {c.name:<28} {c.nbytes / 1e9:9.3f} GB  {c.place}{times.get(c.place, '')}"
            for c in self.components
            if c.nbytes
        ]
        total = f"  {'host, together':<28} {self.host_bytes / 1e9:9.3f} GB"
        return "\n".join(["memory plan:", *lines, total])

    def spare_host_bytes(self, free: int) -> int:
        """What this leaves of `free` bytes of host memory, for each rank; negative: too little."""
        return (free - _margin(free) - self.host_bytes) // self.ranks

    @property
    def resident_bytes(self) -> int:
        """Of experts that stay in the accelerator's memory."""
        return sum(c.nbytes for c in self.components if c.name == _RESIDENT)

    def spare_device_bytes(self, free: int) -> int:
        """What this leaves of `free` bytes of an accelerator; negative: too little."""
        return free - _margin(free) - self.of("device")

    def fits_device(self, free: int) -> bool:
        """Whether `free` bytes of an accelerator are enough."""
        return self.spare_device_bytes(free) >= 0

    def from_disk(self, free: int) -> int:
        """Bytes of mapped experts that `free` bytes of memory cannot hold beside the rest."""
        rest = self.host_bytes - self.of("machine")
        return max(0, self.of("machine") - max(0, free - _margin(free) - rest))

    def shortages(
        self, host_free: int, device_free: int | None, disk_tier: bool = False
    ) -> list[str]:
        """What would pass a limit, a line for each place.

        disk_tier: mapped experts may be read from the disk again and again.
        """
        needed = self.host_bytes
        if disk_tier:  # of experts only those of two layers: one is computed, the next one comes
            needed += min(self.of("machine"), self.two_layers) - self.of("machine")
        limits = [("host", needed, host_free)]
        if device_free is not None:
            limits.append(("device", self.of("device"), device_free))
        return [
            f"{place}: needs {needed / 1e9:.2f} GB, free are {free / 1e9:.2f} GB less "
            f"{_margin(free) / 1e9:.2f} GB of margin"
            for place, needed, free in limits
            if needed > free - _margin(free)
        ]

    def require(
        self, host_free: int, device_free: int | None, enforce: bool, disk_tier: bool = False
    ) -> None:
        """Raises MemoryPlanError where a limit would be passed; warns where not `enforce`.

        disk_tier: as above.
        """
        problems = self.shortages(host_free, device_free, disk_tier)
        if not problems:
            return
        over = self.from_disk(host_free)
        disk = ""
        if over and not disk_tier and self.of("machine"):
            disk = (
                f"; disk_tier: true goes on with less memory, and reads {over / 1e9:.1f} GB of "
                "experts from the disk in every pass"
            )
        message = (
            "not enough memory:\n"
            + "\n".join(f"  - {p}" for p in problems)
            + f"\n{self.text()}\nSmaller are: weights: int4, a shorter cutoff_len, a smaller "
            "per_device_train_batch_size, activations: recompute, a lower lora_rank, "
            "expert_lora: shared; on the device, adapters: host, gpu_experts: 0, schedule: host"
            f"{disk}"
        )
        if enforce:
            raise MemoryPlanError(f"{message}. memory_check: false starts all the same")
        logger.warning("%s", message)


def _margin(free: int) -> int:
    return max(_MARGIN_BYTES, int(_MARGIN_SHARE * free))


def _dtype(rest: RestOfModel) -> torch.dtype:
    return torch.float32 if rest.element_bytes == 4 else torch.bfloat16


def lora_parameters(layer: LayerNeeds, rank: int) -> int:
    """Parameters of the LoRA of one layer of experts."""
    layout = layer.layout
    copies = 1 if layer.shared_lora else layout.experts
    return copies * rank * sum(sum(layout.shape(p)) for p in layer.factors)


def held_bytes(layer: LayerNeeds, work: Workload, element_bytes: int) -> int:
    """What one layer holds between forward and backward."""
    rows = work.tokens * layer.top_k
    kept = kept_bytes(layer.layout, rows, [work.rank] * len(layer.factors))
    return kept + rows * 8 + work.tokens * layer.layout.hidden * element_bytes


def staged_bytes(layer: LayerNeeds, work: Workload, element_bytes: int) -> int:
    """Hidden states, indices and routing weights of one layer, copied from an accelerator."""
    hidden = work.tokens * layer.layout.hidden * element_bytes
    return hidden + work.tokens * layer.top_k * (8 + _FLOAT)


def workspace_bytes(
    layer: LayerNeeds, work: Workload, arithmetic: Arithmetic, rest: RestOfModel
) -> int:
    """Temporary memory of one layer's backward, its LoRA's gradients included."""
    ranks = [work.rank if p in layer.factors else 0 for p in PROJECTIONS]
    temporary = backward_bytes(
        layer.layout,
        arithmetic.compute,
        work.tokens,
        layer.top_k,
        _dtype(rest),
        ranks,
        shared=layer.shared_lora,
        isa=arithmetic.isa,
        threads=arithmetic.threads,
        max_rows=rows_within(layer.layout, arithmetic.compute),
    )
    return temporary + _FLOAT * lora_parameters(replace(layer, shared_lora=False), work.rank)


def crossing_bytes(
    layers: Sequence[LayerNeeds], work: Workload, element_bytes: int, lora: bool
) -> int:
    """The most that crosses the link in one copy; lora: the experts' LoRA crosses it too."""
    copies = [staged_bytes(layer, work, element_bytes) for layer in {*layers}]
    if lora:
        copies += [_FLOAT * lora_parameters(layer, work.rank) for layer in {*layers}]
    return max(copies, default=0)


def plan_memory(
    layers: Sequence[LayerNeeds],
    rest: RestOfModel,
    work: Workload | None,
    *,
    arithmetic: Arithmetic,
    keeps: bool,
    mapped: bool,
    ranks: int,
    adapters: str = "device",
    on_device: OnDevice | None = None,
) -> MemoryPlan:
    """The plan of a run; without `work`, of a model that only computes forwards.

    keeps: what gradient checkpointing does with the experts' activations. mapped: the experts are a
    file that all ranks of the machine map. adapters: where their LoRA is, device or host.
    on_device: if the accelerator computes experts too.
    """
    there = "host" if rest.on_host else "device"
    lora_there = "host" if adapters == "host" else there
    shared = "machine" if mapped else "host"
    experts = sum(layer.layout.nbytes for layer in layers)
    parts = [
        Component("routed experts", shared, experts),
        Component("other weights", there, rest.nbytes - rest.host_bytes),
        Component("embeddings", "host", rest.host_bytes),
    ]
    if on_device is not None and not rest.on_host:
        models = 1 + (work.frozen_models if work is not None else 0)
        parts.append(Component(_RESIDENT, "device", models * on_device.resident_bytes))
        tokens = work.tokens if work is not None else _FORWARD_TOKENS
        needs = [device_bytes(la.layout, tokens, la.top_k, _dtype(rest)) for la in layers]
        held = gradients = 0
        if work is not None:
            if work.checkpointing and keeps:  # every layer's output
                held = len(needs) * tokens * rest.hidden * rest.element_bytes
            # Sums of LoRA's gradients for the experts there, and as the parameters have them.
            gradients = 2 * _FLOAT * max(lora_parameters(layer, work.rank) for layer in layers)
        parts += [
            Component("working memory of experts", "device", max(n.working for n in needs)),
            Component("gradients of experts there", "device", gradients),
            Component("outputs of experts there", "device", held),
            Component("pinned memory of experts", "host", max(n.pinned for n in needs)),
        ]
    if work is not None:
        trained = sum(lora_parameters(layer, work.rank) for layer in layers)
        workspaces = [workspace_bytes(layer, work, arithmetic, rest) for layer in {*layers}]
        kept = [held_bytes(layer, work, rest.element_bytes) for layer in layers]
        # Without checkpointing autograd holds every layer's; recompute has one at a time.
        held = sum(kept) if keeps or not work.checkpointing else max(kept, default=0)
        # The same goes for what an accelerator's tensors are copied to.
        copies = [staged_bytes(layer, work, rest.element_bytes) for layer in layers]
        copied = max(copies, default=0) if work.checkpointing else sum(copies)
        crosses = adapters == "device"
        if crosses:  # LoRA, and the sums of its gradients
            copied += _FLOAT * trained * (2 if work.accumulates else 1)
        crossing = crossing_bytes(layers, work, rest.element_bytes, crosses)
        # The same buffers for all layers, down and up.
        pinned = 2 * BUFFERS * pinned_size(crossing)
        # Packed on the device: what goes down, and where what comes up lands.
        packed = 2 * crossing
        tensor = work.tokens * rest.hidden * rest.element_bytes
        # With checkpointing: the input of every layer, and all of one.
        away = rest.layers if work.checkpointing and work.offloads and not rest.on_host else 0
        held_tensors = rest.layers + _HELD_TENSORS - away
        if not work.checkpointing:
            held_tensors = rest.layers * _HELD_TENSORS
        tensors = held_tensors + _PASSING_TENSORS
        # In pieces they are as large as the hidden states.
        width = rest.hidden if work.fused_loss else rest.vocabulary
        logits = _LOGIT_COPIES * work.tokens * width * _FLOAT
        # Of one layer with checkpointing, else of all; the softmax is computed in fp32.
        squares = work.tokens * work.length * rest.heads * rest.element_bytes
        squares *= _SQUARES * (1 if work.checkpointing else rest.layers) if work.eager else 0
        parts += [
            Component("frozen models' experts", shared, work.frozen_models * experts),
            Component("frozen models' other weights", there, work.frozen_models * rest.nbytes),
            Component("expert LoRA and its optimizer", lora_there, _STATES * _FLOAT * trained),
            Component("other trained parameters", there, _STATES * _FLOAT * work.other_trained),
            Component("experts' activations", "host", held),
            Component("copies for the host", "host", 0 if rest.on_host else copied),
            Component("pinned memory of the link", "host", 0 if rest.on_host else pinned),
            Component("kernels' workspace", "host", max(workspaces, default=0)),
            Component("other activations (estimate)", there, tensor * tensors + logits),
            Component("eager attention (estimate)", there, squares),
            Component("inputs of the layers", "host", tensor * away),
            Component("tensors on the link", "device", 0 if rest.on_host else packed),
        ]
    two = sum(sorted(layer.layout.nbytes for layer in layers)[-2:])
    return MemoryPlan(tuple(parts), ranks, adapters, keeps, two, tuple(layers), work)
