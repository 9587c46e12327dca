"""`kt-sft plan` where there is an accelerator: what it measures there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from device_child import DEVICE, on_device
from simulated_device import SimulatedDevice
from tiny_configs import build

FAMILIES = ("qwen3_moe", "deepseek_v3", "qwen3_next", "gpt_oss")


def _planned(device: SimulatedDevice, family: str, folder: str) -> None:
    from kt_sft.cli.plan import PLAIN, question_of
    from kt_sft.forecast import machines
    from kt_sft.forecast.forecast import ask

    # As large as a graphics card's would take minutes here.
    machines._SAMPLE, machines._device_bandwidth = 64, lambda _: 1e9
    model: Any = build(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    recipe = {**PLAIN, "cutoff_len": 64, "model_name_or_path": folder, "kt_sft": {"threads": 1}}
    question = question_of(recipe, None, None)
    assert question.machine.device is not None and question.measures_rest
    device.clear()
    forecast = ask(question)
    seen = device.observed()
    assert seen.violations == []
    # Attention, LoRA and loss ran there, forward and backward, and so did AdamW.
    names = {job.name for job in seen.trace if job.kind == "compute"}
    assert {"aten::mm", "aten::_log_softmax_backward_data", "aten::_fused_adamw_"} <= names, names
    assert {"other layers", "link", "optimizer"} <= set(forecast.step.parts)
    assert not forecast.counted
    assert torch.accelerator.current_accelerator().type == DEVICE  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_beside_the_experts_is_measured_there(family: str, tmp_path: Path) -> None:
    on_device(_planned, family, str(tmp_path))
