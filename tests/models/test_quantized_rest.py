"""bitsandbytes for everything beside the routed experts, against stock Transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from comparators import assert_matches
from peft import LoraConfig, get_peft_model
from quantized_checkpoints import QUANTIZED_FORMATS
from test_formats import make
from tiny_models import make_model, take_effective_weights
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.errors import SettingsError, UnsupportedModelError
from kt_sft.experts import hybrid_experts_of

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
BITS: dict[str, dict[str, Any]] = {
    "4": FOUR,
    "4, double": {**FOUR, "bnb_4bit_use_double_quant": True},
    "8": {"load_in_8bit": True},
}
IDS = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(3))


def hybrid(folder: Path, bits: str | None, **settings: Any) -> nn.Module:
    rest = BitsAndBytesConfig(**BITS[bits]) if bits else None
    config = HybridExpertsConfig(threads=1, rest=rest, **settings)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )


def in_codes(model: nn.Module) -> set[str]:
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_follows_stock(tmp_path: Path, family: str, bits: str) -> None:
    """Stock keeps experts, which are no linear layers, in full precision."""
    folder = tmp_path / "model"
    make_model(family).save_pretrained(folder)
    effective = make_model(family)
    take_effective_weights(effective, hybrid(folder, None))
    effective.save_pretrained(tmp_path / "effective")
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "effective",
        quantization_config=BitsAndBytesConfig(**BITS[bits]),
        dtype=torch.float32,
    )
    ours = hybrid(folder, bits)
    assert in_codes(ours) == in_codes(stock) != set()
    results = []
    for model in (ours, stock):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
        model.enable_input_require_grads()
        out = model(IDS, labels=IDS)
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.logits, grads))
    (logits, grads), (want_logits, want_grads) = results
    # 8 bits round activations to integers, which turns small differences into steps.
    bound = 2e-2 if bits == "8" else 1e-3
    assert_matches(logits, want_logits, bound, "logits")
    assert grads.keys() == want_grads.keys() and any("o_proj" in n for n in grads)
    for name, gradient in want_grads.items():
        if gradient.any():
            assert_matches(grads[name], gradient, 2 * bound, name)


def test_experts_train_beside_it(tmp_path: Path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)
    model = hybrid(tmp_path, "4")
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    )
    model(IDS, labels=IDS).loss.backward()
    trained = {n.rpartition(".lora_")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert any("experts" in n for n in trained) and any("q_proj" in n for n in trained)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "mixtral"])
def test_routers_stay(tmp_path: Path, family: str) -> None:
    make_model(family).save_pretrained(tmp_path)
    model = hybrid(tmp_path, "4")
    assert not any("gate" in n.rpartition(".")[2] and "proj" not in n for n in in_codes(model))
    assert not any("lm_head" in n for n in in_codes(model))
    assert any("self_attn" in n for n in in_codes(model))
    shared = any("shared" in n for n, _ in model.named_modules())
    assert shared == any("shared" in n for n in in_codes(model))


def test_shared_experts_as_wide_as_there_are_experts_are_no_routers(tmp_path: Path) -> None:
    """As in Qwen3-Next: 512 of them, and 512 channels."""
    make_model("qwen2_moe", shared_expert_intermediate_size=8).save_pretrained(tmp_path)
    model = hybrid(tmp_path, "4")
    shared = {n for n in in_codes(model) if "shared" in n and "layers.0." in n}
    block = "model.layers.0.mlp.shared_expert"
    assert shared == {f"{block}.{p}" for p in ("gate_proj", "up_proj", "down_proj")}


def test_the_callers_configuration_is_left_alone(tmp_path: Path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)
    given = BitsAndBytesConfig(**FOUR)
    before = given.to_dict()
    AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=HybridExpertsConfig(threads=1, rest=given)
    )
    assert given.to_dict() == before


def test_a_model_in_memory_is_refused() -> None:
    config = HybridExpertsConfig(rest=BitsAndBytesConfig(**FOUR))
    with pytest.raises(SettingsError, match="rest: a model in memory is not quantized"):
        hybridize(make_model("qwen3_moe"), config)


@pytest.mark.parametrize("bits", BITS)
def test_the_plan_counts_it(tmp_path: Path, bits: str, caplog: pytest.LogCaptureFixture) -> None:
    make_model("qwen3_moe", hidden_size=256).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "kt_sft"):
        model = hybrid(tmp_path, bits)
    runtime = next(iter(hybrid_experts_of(model).values())).runtime
    experts = sum(m.weights.nbytes for m in hybrid_experts_of(model).values())
    taken = sum(p.nbytes for p in model.parameters())
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            taken += state.absmax.nbytes
        taken += getattr(getattr(module, "weight", None), "SCB", torch.empty(0)).nbytes
    planned = runtime.planned[0] - experts
    assert abs(planned - taken) <= 0.01 * taken


@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_in_codes_is_quantized_anew(tmp_path: Path, bits: str) -> None:
    """DeepSeek-V3 is published in fp8: what is beside its experts goes to 4 bits from there."""
    make("fp8_block", "deepseek_v3").save_pretrained(tmp_path / "plain")
    QUANTIZED_FORMATS["fp8_block"].write(tmp_path / "plain", tmp_path / "coded")
    whole = hybrid(tmp_path / "coded", None)
    ours = hybrid(tmp_path / "coded", bits)
    assert in_codes(ours)
    for name in in_codes(ours):
        module, want = ours.get_submodule(name), whole.get_submodule(name).weight
        eye = torch.eye(want.shape[1])
        got = module(eye).float()
        fresh = type(module)(want.shape[1], want.shape[0], bias=False, **_made_as(bits))
        fresh.load_state_dict({"weight": want.detach()})
        torch.testing.assert_close(got, fresh.to("cpu").eval()(eye).float(), rtol=1e-3, atol=1e-3)
    ours(IDS, labels=IDS)


def _made_as(bits: str) -> dict[str, Any]:
    if bits == "8":
        return {"has_fp16_weights": False}
    double = "double" in bits
    return {"compute_dtype": torch.float32, "quant_type": "nf4", "compress_statistics": double}


def test_neither_of_both_is_refused(tmp_path: Path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="neither load_in_4bit nor load_in_8bit"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=HybridExpertsConfig(rest=BitsAndBytesConfig())
        )


def test_a_saved_configuration_keeps_it() -> None:
    config = HybridExpertsConfig(weights="bf16", rest=BitsAndBytesConfig(**FOUR))
    again = HybridExpertsConfig.from_dict(config.to_dict())
    assert again.rest.to_dict() == config.rest.to_dict()
    assert again.settings == config.settings
