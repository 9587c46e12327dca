"""What PEFT is asked to put into a hybrid model and cannot: refused by name, never dropped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from tiny_configs import build
from tiny_models import make_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from kt_sft import HybridExpertsCallback, HybridExpertsConfig, hybridize
from kt_sft.errors import SettingsError, UnsupportedModelError
from kt_sft.experts import hybrid_experts_of
from kt_sft.planning.lora_targets import LoraTargets
from kt_sft.planning.outline import TrainingOutline
from kt_sft.training.trained import packed_weights, trained_by_kind

EXPERTS = ["gate_proj", "up_proj", "down_proj"]


def hybrid(family: str = "qwen3_moe", **settings: Any) -> nn.Module:
    model = make_model("mixtral") if family == "mixtral" else build(family)
    return hybridize(model, HybridExpertsConfig(**settings))


def refused(model: nn.Module, config: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        get_peft_model(model, config)


@pytest.mark.parametrize(
    "target", ["mlp.experts.gate_up_proj", "experts.down_proj", "gate_up_proj", "down_proj.weight"]
)
def test_parameters_of_the_stock_experts(target: str) -> None:
    config = LoraConfig(target_modules=["q_proj"], target_parameters=[target])
    if target == "down_proj.weight":
        # Of no experts: PEFT has its own word on it, here that the dense layers have LoRA to get.
        get_peft_model(hybrid("qwen3_moe"), config)
        return
    refused(hybrid(), config, f"{target}.*write target_modules: gate_proj, up_proj, down_proj")


@pytest.mark.parametrize("targets", [["q_proj", "gate_up_proj"], ["q_proj", "w1", "w3"]])
def test_names_of_the_stock_experts(targets: list[str]) -> None:
    """PEFT passes over a name that matches nothing where another one matches."""
    refused(hybrid("mixtral"), LoraConfig(target_modules=targets), f"target_modules: {targets[1]}")


def test_a_name_of_no_experts_is_passed_over_as_ever() -> None:
    model = get_peft_model(hybrid(), LoraConfig(target_modules=["q_proj", "wqkv", *EXPERTS]))
    assert all(m.gate_proj.lora_A for m in hybrid_experts_of(model).values())


@pytest.mark.parametrize(
    "names", [["q_proj", "gate"], [*EXPERTS, "gate"], ["mlp.experts.up_proj", "gate"]]
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_router_among_the_targets(names: list[str], loaded: bool, tmp_path: Path) -> None:
    """Before the experts are packed where a recipe says what it trains."""
    message = "gate is a router.*modules_to_save: gate"
    if loaded:
        refused(hybrid(), LoraConfig(target_modules=names), message)
        return
    build("qwen3_moe").save_pretrained(tmp_path)
    config = HybridExpertsConfig()
    config.outline = TrainingOutline(64, 8, LoraTargets.of(*names))
    with pytest.raises(SettingsError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(target_modules=["q_proj", "up_proj"]),
        VeraConfig(target_modules=["q_proj", "up_proj"]),
        AdaLoraConfig(target_modules=["q_proj", "up_proj"], total_step=10),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_over_experts(config: Any) -> None:
    refused(hybrid(), config, f"{config.peft_type.value}: routed experts take LoRA only")


def test_other_methods_beside_experts() -> None:
    model = get_peft_model(hybrid(), LoHaConfig(target_modules=["q_proj"]))
    assert any("hada" in n for n, p in model.named_parameters() if p.requires_grad)


def test_lora_on_a_router() -> None:
    refused(
        hybrid(),
        LoraConfig(target_modules=["q_proj", "gate"]),
        r"mlp\.gate is a router.*modules_to_save: gate \(additional_target",
    )
    trained = get_peft_model(hybrid(), LoraConfig(target_modules=EXPERTS, modules_to_save=["gate"]))
    assert any(
        "gate.modules_to_save" in n for n, p in trained.named_parameters() if p.requires_grad
    )


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias", "use_qalora"])
def test_variants_of_lora_over_experts(variant: str) -> None:
    config = LoraConfig(target_modules=["q_proj", *EXPERTS], **{variant: True})
    refused(hybrid(), config, f"{variant}: ")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_all_linear_is_all_of_them(family: str) -> None:
    """With dense layers, whose names the experts share, and without."""
    model = get_peft_model(hybrid(family), LoraConfig(target_modules="all-linear"))
    for module in hybrid_experts_of(model).values():
        assert all(layer.lora_A for layer in module.lora_layers())
    assert not any("lm_head" in n for n, p in model.named_parameters() if p.requires_grad)


def test_a_first_adapter_freezes_the_rest_and_a_second_one_leaves_the_first() -> None:
    model = get_peft_model(hybrid(), LoraConfig(target_modules=EXPERTS))
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    model.add_adapter("second", LoraConfig(target_modules=EXPERTS))
    assert any("default" in n for n, p in model.named_parameters() if p.requires_grad)


def test_stock_models_are_left_to_peft() -> None:
    model = get_peft_model(build("qwen3_moe"), LoraConfig(target_modules=["q_proj", "w1"]))
    assert isinstance(model, PeftModel)


def test_save_pretrained_says_what_to_save(tmp_path: Any) -> None:
    for model in (hybrid(), get_peft_model(hybrid(), LoraConfig(target_modules=EXPERTS))):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        with pytest.raises(UnsupportedModelError, match=r"Save the adapter.*kt-sft export"):
            base.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_what_trains_is_counted_with_the_packed_experts(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stock = build("qwen3_moe")
    everything = sum(p.numel() for p in stock.parameters())
    model = hybrid()
    assert packed_weights(model) + sum(p.numel() for p in model.parameters()) == everything
    config = LoraConfig(r=4, target_modules=["q_proj", *EXPERTS], modules_to_save=["lm_head"])
    model = get_peft_model(model, config)
    kinds = {k.kind: (k.modules, k.parameters) for k in trained_by_kind(model)}
    experts = hybrid_experts_of(model)
    first = next(iter(experts.values())).shape
    of_experts = 3 * len(experts) * 4 * first.experts * (first.hidden + first.intermediate)
    assert kinds["LoRA on routed experts"] == (3 * len(experts), of_experts)
    assert kinds["in full"] == (1, 300 * 64)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(count for _, count in kinds.values()) == trained
    with caplog.at_level(logging.INFO):
        Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            callbacks=[HybridExpertsCallback()],
        )
    assert f"LoRA on routed experts: {of_experts:,} in {3 * len(experts)} modules" in caplog.text
    assert f"{packed_weights(model):,} are packed experts" in caplog.text


def test_the_total_of_llamafactorys_line_holds_the_packed_experts() -> None:
    from llamafactory.extras.misc import count_parameters

    from kt_sft.plugin.modes import with_packed_experts

    stock, model = build("qwen3_moe"), hybrid()
    assert with_packed_experts(count_parameters)(model)[1] == count_parameters(stock)[1]
    assert torch.is_grad_enabled()
