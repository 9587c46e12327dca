"""The memory plan of a model that is about to be loaded: printed, and refused where it is over."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kt_sft.adapters.layer import HybridExpertsLinear
from kt_sft.checkpoint.layouts import own_layout
from kt_sft.config import HybridExpertsSettings
from kt_sft.families.finding import FoundExperts
from kt_sft.families.table import TOP_K_NAMES
from kt_sft.kernels import WeightLayout, requested_isa
from kt_sft.kernels.formats import AS_PUBLISHED
from kt_sft.machine import allocator
from kt_sft.machine.accelerator import free_device_memory, has_accelerator
from kt_sft.machine.cpus import place_among_ranks, ranks_everywhere, threads_of
from kt_sft.machine.memory import available_memory_bytes
from kt_sft.planning.lora_targets import LoraTargets
from kt_sft.planning.plan import (
    Arithmetic,
    LayerNeeds,
    MemoryPlan,
    OnDevice,
    RestOfModel,
    Workload,
    plan_memory,
)
from kt_sft.scheduling.residents import ResidentBudget

logger = logging.getLogger(__name__)

# Of the device memory that nothing else is planned for, resident experts take so much: activations
# are estimates, and of prompts and their caches nothing is known.
PART_OF_SPARE = {"training": 0.85, "inference": 0.6}
# Experts per token where a configuration does not tell; what most families have.
_GUESSED_TOP_K = 8


@dataclass(frozen=True)
class TrainingOutline:
    """What a recipe says about a training before its model exists.

    tokens: of one micro batch at most. targets: the layers that get LoRA; trained: names of
    modules that train in full. on_host: the training runs without an accelerator. frozen_models:
    reference and reward models that are loaded after this one. accumulates, offloads, fused_loss,
    length, eager: as of Workload. one_kind: DeepSpeed or FSDP trains, which want parameters of one
    kind of device. references: forwards of the base without its adapter in each micro batch.
    """

    tokens: int
    rank: int
    targets: LoraTargets
    trained: frozenset[str] = frozenset()
    checkpointing: bool = True
    on_host: bool = False
    frozen_models: int = 0
    accumulates: bool = False
    offloads: bool = False
    fused_loss: bool = False
    one_kind: bool = False
    length: int = 0
    eager: bool = False
    references: int = 0

    def adapted(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Path of a block of experts -> its projections that get LoRA."""
        found: dict[str, tuple[str, ...]] = {}
        for path, module in self.targets.modules(model):
            if isinstance(module, HybridExpertsLinear):
                block, _, name = path.rpartition(".")
                found[block] = (*found.get(block, ()), name)
        return found

    def workload(self, model: nn.Module) -> Workload:
        """With the parameters that train beside the experts counted."""
        other = sum(
            p.numel()
            for path, module in model.named_modules()
            if path.rpartition(".")[2] in self.trained
            for p in module.parameters()
        )
        on_experts = False
        for path, module in self.targets.modules(model):
            if isinstance(module, HybridExpertsLinear):
                on_experts = True
            elif isinstance(module, nn.Linear) and path.rpartition(".")[2] not in self.trained:
                other += self.rank * (module.in_features + module.out_features)
        rank = self.rank if on_experts else 0
        return Workload(
            self.tokens,
            rank,
            checkpointing=self.checkpointing,
            other_trained=other,
            frozen_models=self.frozen_models,
            accumulates=self.accumulates,
            offloads=self.offloads,
            fused_loss=self.fused_loss,
            length=min(self.length, self.tokens),
            eager=self.eager,
        )


@dataclass(frozen=True)
class Surroundings:
    """What a run finds, here or on a machine that a person has described.

    isa, threads: of the experts. ranks: of this machine; ranks_everywhere: of all. host_free,
    device_free: bytes; the latter None where a device does not tell, or there is none.
    """

    isa: str
    threads: int
    host_free: int
    has_device: bool
    device_free: int | None = None
    ranks: int = 1
    ranks_everywhere: int = 1

    @classmethod
    def here(cls, settings: HybridExpertsSettings) -> Surroundings:
        """Of this process."""
        return cls(
            requested_isa(settings.isa),
            threads_of(settings.threads),
            available_memory_bytes(),
            has_accelerator(),
            free_device_memory(),
            place_among_ranks()[1],
            ranks_everywhere(),
        )


def top_k_of(config: Any, experts: int) -> int:
    """Experts per token, by the names that families have for it."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = (getattr(text, name, None) for name in TOP_K_NAMES)
    known = next((k for k in named if isinstance(k, int)), None)
    if known is None:
        logger.warning(
            "memory plan: the configuration of %s has no number of experts per token by a name "
            "that kt_sft knows (%s); %d are planned for",
            getattr(config, "model_type", type(config).__name__),
            ", ".join(TOP_K_NAMES),
            _GUESSED_TOP_K,
        )
    return min(experts, _GUESSED_TOP_K if known is None else known)


def _layouts(
    layers: Sequence[FoundExperts],
    published: Callable[[FoundExperts], WeightLayout],
    weights: str,
) -> list[WeightLayout]:
    """Of every layer; those of one shape are stored alike, so one of them is looked at."""
    known: dict[Any, WeightLayout] = {}
    # A model that is being loaded is built on the meta device, where nothing can be read.
    with torch.device("cpu"):
        for layer in layers:
            if layer.shape not in known:
                own = weights != AS_PUBLISHED
                known[layer.shape] = own_layout(layer, weights) if own else published(layer)
    return [known[layer.shape] for layer in layers]


def plan_of(
    model: Any,
    layers: Sequence[FoundExperts],
    published: Callable[[FoundExperts], WeightLayout],
    settings: HybridExpertsSettings,
    outline: TrainingOutline | None,
    rest_bytes: int | None = None,
    surroundings: Surroundings | None = None,
) -> MemoryPlan:
    """The plan for a model whose stock experts are gone and whose weights are not there yet.

    published: the layout that the checkpoint's own form means, asked for `weights: checkpoint`.
    rest_bytes: of the weights beside the experts, where their parameters do not tell.
    surroundings: of this process, if not given.
    With `adapters: auto` and `activations: auto` it decides what they mean.
    """
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    config = text or model.config
    around = surroundings or Surroundings.here(settings)
    on_host = not around.has_device or (outline is not None and outline.on_host)
    parameters, embeddings = list(model.parameters()), model.get_input_embeddings().weight
    rest = RestOfModel(
        nbytes=sum(p.nbytes for p in parameters) if rest_bytes is None else rest_bytes,
        hidden=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        vocabulary=int(config.vocab_size),
        element_bytes=embeddings.element_size(),
        on_host=on_host,
        host_bytes=embeddings.nbytes if settings.embeddings == "host" else 0,
        heads=int(getattr(config, "num_attention_heads", 0) or 0),
    )
    adapted = outline.adapted(model) if outline else {}
    needs = [
        LayerNeeds(
            layout,
            top_k_of(model.config, layout.experts),
            settings.expert_lora == "shared",
            adapted.get(layer.hybrid_path, ()),
        )
        for layer, layout in zip(layers, _layouts(layers, published, settings.weights), strict=True)
    ]
    plan = functools.partial(
        plan_memory,
        needs,
        rest,
        outline.workload(model) if outline else None,
        arithmetic=Arithmetic(settings.compute, around.isa, around.threads),
        mapped=settings.store != "memory" and settings.resident is not True,
        ranks=around.ranks,
        on_device=_on_device(settings, needs),
    )
    adapters = "device"
    if not on_host:
        adapters = settings.adapters
        if adapters == "auto":
            alone = around.ranks_everywhere == 1
            may_choose = outline is not None and not outline.one_kind and alone
            adapters = _place_of_adapters(plan, around.device_free if may_choose else None)
    keeps = settings.activations != "recompute"
    plan = functools.partial(plan, adapters=adapters)
    planned = plan(keeps=keeps)
    if settings.activations == "auto" and planned.spare_host_bytes(around.host_free) < 0:
        keeps = False
        planned = plan(keeps=keeps)
    if not on_host and settings.gpu_experts == "auto":
        spare = planned.spare_device_bytes(around.device_free or 0)
        part = PART_OF_SPARE["training" if outline else "inference"]
        every = sum(layer.layout.nbytes for layer in needs)
        planned = plan(keeps=keeps, on_device=OnDevice(min(every, max(0, int(part * spare)))))
    return planned


def _on_device(settings: HybridExpertsSettings, needs: Sequence[LayerNeeds]) -> OnDevice | None:
    """What the settings say of experts on the accelerator, `auto` left open."""
    if settings.schedule == "host":
        return None
    budget = ResidentBudget.of(settings.gpu_experts)
    each = [layer.layout.nbytes // layer.layout.experts for layer in needs]
    if budget.per_layer is not None:
        counts = [min(budget.per_layer, layer.layout.experts) for layer in needs]
        return OnDevice(sum(n * size for n, size in zip(counts, each, strict=True)))
    every = sum(layer.layout.nbytes for layer in needs)
    return OnDevice(min(budget.nbytes or 0, every))


def _place_of_adapters(plan: Callable[..., MemoryPlan], free: int | None) -> str:
    """What `adapters: auto` means where `free` bytes of the device are; None: not known."""
    there, here = (plan(adapters=place, keeps=True) for place in ("device", "host"))
    if free is None or there.fits_device(free) or not here.fits_device(free):
        return "device"
    logger.info(
        "adapters: the experts' LoRA goes to the host, where its optimizer steps too; the device "
        "would have to hold %.2f GB and has %.2f GB free",
        there.of("device") / 1e9,
        free / 1e9,
    )
    return "host"


def check_memory(plan: MemoryPlan, settings: HybridExpertsSettings) -> None:
    """Prints the plan. Raises MemoryPlanError where it does not fit and is to be enforced."""
    logger.info("%s", plan.text())
    on_device = plan.of("device")
    free = available_memory_bytes()
    device_free = free_device_memory() if on_device else None
    plan.require(free, device_free, settings.memory_check, settings.disk_tier)
    if not on_device:
        allocator.settle(plan.host_bytes, free)
