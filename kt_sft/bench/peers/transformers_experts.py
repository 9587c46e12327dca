"""Transformers' own experts module in bf16: eager, grouped_mm, and grouped_mm with PEFT's LoRA."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kt_sft.bench.case import LORA_SCALING, LayerCase, LayerData, Runner, one_expert, timed

logger = logging.getLogger(__name__)


class _Wrapper(nn.Module):
    """PEFT adapts modules inside a model; this is the smallest one."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """out [T, D]."""
        return self.experts(hidden_TD, index_TK, weight_TK)


def _experts(case: LayerCase, implementation: str, parameters: Mapping[str, Tensor]) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=case.experts,
        hidden_size=case.hidden,
        moe_intermediate_size=case.intermediate,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    for name, values in parameters.items():
        setattr(module, name, nn.Parameter(values, requires_grad=False))
    return module


def _runner(module: nn.Module, data: LayerData, trainable: list[Tensor]) -> Runner:
    leaf = data.hidden_TD.detach().clone().requires_grad_()
    weight_TK = data.weight_TK.bfloat16().requires_grad_()
    state: dict[str, Any] = {}

    def forward() -> None:
        state["out"] = module(leaf, data.index_TK, weight_TK)

    def backward() -> None:
        torch.autograd.grad(state.pop("out"), [leaf, weight_TK, *trainable], data.d_out_TD)

    return timed(forward, backward)


@contextmanager
def start(
    case: LayerCase, data: LayerData, environment: Path | None
) -> Iterator[Mapping[str, Runner]]:
    """Runners by implementation; the frozen ones without LoRA, PEFT's with."""
    one = one_expert(case)
    gate_up = torch.cat([one["gate_proj"], one["up_proj"]])
    parameters = {
        "gate_up_proj": gate_up.unsqueeze(0).repeat(case.experts, 1, 1),
        "down_proj": one["down_proj"].unsqueeze(0).repeat(case.experts, 1, 1),
    }
    runners = {
        f"transformers {name}": _runner(_experts(case, name, parameters), data, [])
        for name in ("eager", "grouped_mm")
    }
    if case.rank:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=case.rank,
            lora_alpha=int(LORA_SCALING * case.rank),
            target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        )
        model: Any = _Wrapper(_experts(case, "grouped_mm", parameters))
        model = get_peft_model(model, config).to(torch.bfloat16)
        trainable = [p for p in model.parameters() if p.requires_grad]
        runners["peft grouped_mm"] = _runner(model, data, trainable)
    yield runners
