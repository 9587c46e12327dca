"""Keeping the accelerator's experts those that get the most rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from kt_sft.engines.share import DeviceShare
from kt_sft.engines.split import PartedExperts
from kt_sft.experts.module import HybridExperts
from kt_sft.experts.runtime import ExpertsRuntime
from kt_sft.machine.accelerator import free_device_memory, has_accelerator
from kt_sft.scheduling.profile import Placement, RoutingProfile
from kt_sft.scheduling.residents import ResidentBudget, choose_residents

logger = logging.getLogger(__name__)

# Without a plan `auto` takes so much of what is free, so that activations have room.
_PART_OF_FREE = 0.4
# What is free differs a little from start to start.
_SAME_ROOM = 1.1


def _shares(modules: Mapping[str, HybridExperts]) -> dict[str, DeviceShare]:
    """Of the layers that an accelerator may have a share of, by their paths in the base model."""
    placed = {module.path: module.weights for module in modules.values()}
    return {
        path: experts.share
        for path, experts in placed.items()
        if isinstance(experts, PartedExperts) and experts.share is not None
    }


def placement_of(modules: Mapping[str, HybridExperts]) -> Placement:
    """Layer by layer, the experts that are in the accelerator's memory."""
    runtime = next(iter(modules.values())).runtime
    budget = runtime.resident_budget
    residents = {path: share.resident for path, share in _shares(modules).items()}
    return Placement(residents, runtime.settings.schedule, budget.per_layer, budget.nbytes)


def restore_residents(modules: Mapping[str, HybridExperts], saved: Path) -> None:
    """The profile of a checkpoint, and its places if they were chosen by the same settings; with
    others they are chosen anew. Raises OSError."""
    runtime = next(iter(modules.values())).runtime
    counts = {module.path: module.shape.experts for module in modules.values()}
    runtime.routing, placement = RoutingProfile.load(saved, counts)
    if placement.schedule != runtime.settings.schedule or not _may_have(runtime, placement.budget):
        place_residents(modules)
        return
    runtime.resident_budget = placement.budget
    for path, share in _shares(modules).items():
        share.place(placement.residents.get(path, ()))


def _may_have(runtime: ExpertsRuntime, saved: ResidentBudget) -> bool:
    """Whether a saved budget is that of the settings; with `auto`, whether there is room for it."""
    budget = runtime.resident_budget
    if runtime.settings.gpu_experts != "auto":
        return saved == budget
    if saved.nbytes is None:
        return False
    return budget.nbytes is None or saved.nbytes <= _SAME_ROOM * budget.nbytes


def place_residents(modules: Mapping[str, HybridExperts]) -> int:
    """Chooses the resident experts of a model anew, by the rows that they have got so far; not
    within a step, as a backward must find the places of its forward. Returns how many have come."""
    parted = _shares(modules)
    if not parted or not has_accelerator():
        return 0
    runtime = next(iter(modules.values())).runtime
    budget = runtime.resident_budget
    if not budget.decided:
        free = free_device_memory() or 0
        budget = ResidentBudget(nbytes=int(_PART_OF_FREE * free))
        runtime.resident_budget = budget
        if not budget.nbytes:
            logger.warning("gpu_experts: auto has no room; the accelerator does not tell of any")
    shares = runtime.routing.shares()
    loads = {
        path: shares.get(path, [0.0] * share.weights.experts) for path, share in parted.items()
    }
    sizes = {path: share.expert_bytes for path, share in parted.items()}
    former = {path: share.resident for path, share in parted.items()}
    chosen = choose_residents(loads, sizes, budget, former)
    come = 0
    for path, share in parted.items():
        come += len(set(chosen[path]) - set(former[path]))
        share.place(chosen[path])
    if come:
        logger.info(
            "%d experts are to be in the accelerator's memory, %.3f GB; %d of them are new",
            sum(map(len, chosen.values())),
            sum(len(chosen[path]) * sizes[path] for path in chosen) / 1e9,
            come,
        )
    return come
