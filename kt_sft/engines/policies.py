"""The policy that a model's settings mean for a layer, once its device is known."""

from __future__ import annotations

import torch

from kt_sft.config import HybridExpertsSettings
from kt_sft.engines.calibration import Calibrations, MeasuredLayer
from kt_sft.engines.protocol import ExpertsEngine
from kt_sft.engines.split import PartedExperts, PolicyOf
from kt_sft.scheduling.assignment import AllOnDevice, HostOnly, Policy, ResidentOnly
from kt_sft.scheduling.costs import EndsFirst


def policies(settings: HybridExpertsSettings, host: ExpertsEngine) -> PolicyOf:
    """For the layers of a model with these settings; host: the engine of what is left for it."""
    calibrations = Calibrations(settings)
    measured: dict[tuple, Policy] = {}

    def policy_of(experts: PartedExperts, device: torch.device) -> Policy:
        if settings.schedule == "device":
            return AllOnDevice()
        if device.type == "cpu" or experts.share is None:  # nobody to share with
            return HostOnly()
        if settings.schedule == "resident":
            return ResidentOnly()
        key = experts.layout, device
        if key not in measured:
            layer = MeasuredLayer(experts.inner, experts.share.weights, device)
            measured[key] = EndsFirst(calibrations.costs(layer, host))
        return measured[key]

    return policy_of
