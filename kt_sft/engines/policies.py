"""The policy that a model's settings mean for a layer, once its device is known."""

from __future__ import annotations

import functools
import logging

import torch

from kt_sft.config import HybridExpertsSettings
from kt_sft.engines.calibration import Calibrations, MeasuredLayer
from kt_sft.engines.protocol import ExpertsEngine
from kt_sft.engines.split import PartedExperts, PolicyOf
from kt_sft.scheduling.assignment import AllOnDevice, HostOnly, Policy, ResidentOnly
from kt_sft.scheduling.costs import EndsFirst

logger = logging.getLogger(__name__)


@functools.cache
def _warn_of_cpu(schedule: str) -> None:
    """Once."""
    logger.warning("schedule: %s has no effect: the model is not on an accelerator", schedule)


@functools.cache
def _warn_of_parts(schedule: str) -> None:
    """Once."""
    logger.warning(
        "schedule: %s has no effect: memory nodes hold parts of the experts, which were packed in "
        "this process; use a store, or set numa: off",
        schedule,
    )


def policies(settings: HybridExpertsSettings, host: ExpertsEngine) -> PolicyOf:
    """For the layers of a model with these settings; host: the engine of what is left for it."""
    calibrations = Calibrations(settings)
    measured: dict[tuple, Policy] = {}

    def policy_of(experts: PartedExperts, device: torch.device) -> Policy:
        if device.type == "cpu":
            _warn_of_cpu(settings.schedule)
            return HostOnly()
        if experts.share is None:
            _warn_of_parts(settings.schedule)
            return HostOnly()
        if settings.schedule == "device":
            return AllOnDevice()
        if settings.schedule == "resident":
            return ResidentOnly()
        key = experts.layout, device
        if key not in measured:
            layer = MeasuredLayer(experts.inner, experts.share.weights, device)
            costs = calibrations.costs(layer, host)
            logger.info("schedule: auto, one expert's forward with %s", costs.forward.text())
            measured[key] = EndsFirst(costs)
        return measured[key]

    return policy_of
