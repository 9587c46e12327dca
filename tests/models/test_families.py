"""Every family against stock Transformers on the weights that the kernels compute with.

The stock side gets LoRA as W + scaling * B A, differentiable, through `functional_call`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from comparators import assert_matches, tolerance
from fixed_routing import RecordedChoices, RepeatedChoices
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stock_models import expert_tensors, lora_parameters, run_stock, take_effective_weights
from tiny_configs import TINY_FAMILIES, build, text_inputs
from torch import nn

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.experts import hybrid_experts_of

RANK, ALPHA = 3, 6
SCALING = ALPHA / RANK
TARGETS = r".*\.experts\.(gate|up|down)_proj"


def load(name: str, folder: Path, **settings) -> nn.Module:
    cls = getattr(transformers, TINY_FAMILIES[name].auto_class)
    return cls.from_pretrained(
        folder, quantization_config=HybridExpertsConfig(**settings), dtype=torch.float32
    ).eval()


def add_lora(base: nn.Module) -> PeftModel:
    """LoRA on the experts whose B is not zero; everything else trains too."""
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(11)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        p.requires_grad_(p.is_floating_point())
    return model


def assert_gradients_match(name: str, ours: nn.Module, stock: nn.Module, bound: float) -> None:
    """One forward and backward of both, whose routers choose the same experts."""
    mine = dict(ours.named_parameters())
    lora = {path: p.detach().clone().requires_grad_() for path, p in lora_parameters(ours)}
    for model in (ours, stock):
        model.zero_grad()
    our_inputs, stock_inputs = (text_inputs(name, stock) for _ in range(2))
    with RecordedChoices() as recorded:
        want = run_stock(stock, lora, SCALING, stock_inputs)
    assert len(recorded.made) >= TINY_FAMILIES[name].moe_layers
    with RepeatedChoices(recorded, bound):
        got = ours(**our_inputs)
    assert_matches(got.logits, want.logits, bound, "logits")
    assert_matches(got.loss, want.loss, bound, "loss")
    got.loss.backward()
    want.loss.backward()
    assert_matches(
        our_inputs["inputs_embeds"].grad, stock_inputs["inputs_embeds"].grad, bound, "d_hidden"
    )
    for path, reference in lora.items():
        parameter = mine[f"base_model.model.{path}.default"]
        if reference.grad is None:  # experts for images, for instance
            assert parameter.grad is None or not parameter.grad.any(), path
            continue
        for e in range(parameter.shape[0]):
            if reference.grad[e].norm() > 1e-3 * reference.grad.norm():
                assert_matches(parameter.grad[e], reference.grad[e], 2 * bound, f"{path}[{e}]")
    experts = set(expert_tensors(stock))
    for path, p in stock.named_parameters():
        if path not in experts and p.grad is not None and p.grad.norm() > 0:
            # The router's among them, which the gradients of the top-k weights reach.
            assert_matches(mine[f"base_model.model.{path}"].grad, p.grad, 2 * bound, path)


@pytest.mark.parametrize("name", sorted(TINY_FAMILIES))
def test_family_equals_stock(name: str, tmp_path: Path) -> None:
    original = build(name).eval()
    original.save_pretrained(tmp_path / "base")
    base = load(name, tmp_path / "base")
    experts = hybrid_experts_of(base)
    assert len(experts) == TINY_FAMILIES[name].moe_layers
    ours = add_lora(base)
    stock = build(name).eval()
    take_effective_weights(stock, ours)

    assert_gradients_match(name, ours, stock, 2 * tolerance("exact", 6.0, 6))

    ours.save_pretrained(tmp_path / "adapter")
    inputs = text_inputs(name, stock)
    with torch.no_grad():
        trained = ours(**inputs).logits
        loaded = PeftModel.from_pretrained(load(name, tmp_path / "base"), tmp_path / "adapter")
        assert_matches(loaded(**inputs).logits, trained, 1e-5, "with the adapter loaded")
        hybridize(original, HybridExpertsConfig())
        plain = ours.unload()(**inputs).logits
        assert_matches(original(**inputs).logits, plain, 1e-5, "hybridized in memory")
    for path, module in hybrid_experts_of(original).items():
        for projection in module.shape.projections:
            there = experts[path].weights.unpack(3, projection)
            assert torch.equal(module.weights.unpack(3, projection), there)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_bf16_model_stays_near_stock(name: str, tmp_path: Path) -> None:
    build(name).to(torch.bfloat16).save_pretrained(tmp_path)
    cls = getattr(transformers, TINY_FAMILIES[name].auto_class)
    ours = cls.from_pretrained(tmp_path, quantization_config=HybridExpertsConfig()).eval()
    stock = cls.from_pretrained(tmp_path, dtype=torch.float32).eval()
    take_effective_weights(stock, ours)
    assert ours.dtype == torch.bfloat16
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, want = ours(ids).logits.float(), stock(ids).logits
    # bf16 everywhere else: 2^-9 a rounding, some thirty of them along the residual. The median
    # of the tokens, because rounding may tip a router's close decision for one of them.
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(error.median()) < 0.03


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss"])
def test_generate_equals_stock(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    ours = load(name, tmp_path)
    stock = build(name).eval()
    take_effective_weights(stock, ours)
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(2))
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(ids, **arguments), stock.generate(ids, **arguments))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gpt_oss"])
def test_fused_experts_may_lie_either_way_round(name: str, tmp_path: Path) -> None:
    """Published files of qwen3_vl_moe hold [E, inputs, outputs], newly saved ones the reverse."""
    build(name).save_pretrained(tmp_path)
    straight = hybrid_experts_of(load(name, tmp_path))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    turned = [k for k in tensors if k.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(turned) == 2 * len(straight)
    for key in turned:
        tensors[key] = tensors[key].transpose(1, 2).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    other = hybrid_experts_of(load(name, tmp_path))
    for path, module in straight.items():
        for p in module.shape.projections:
            assert torch.equal(module.weights.unpack(2, p), other[path].weights.unpack(2, p))
