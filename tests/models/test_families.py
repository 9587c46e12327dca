"""Every family against stock Transformers on the weights that the kernels compute with.

The stock side gets LoRA as W + scaling * B A, differentiable, through `functional_call`.
"""

from __future__ import annotations

import pytest
import torch
from comparators import assert_matches, tolerance
from peft import LoraConfig, get_peft_model
from tiny_models import (
    FAMILY_CONFIGS,
    make_model,
    stock_experts,
    stock_loss,
    take_effective_weights,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.experts import hybrid_experts_of
from kt_sft.families import FAMILIES
from kt_sft.kernels import PROJECTIONS

RANK, ALPHA = 3, 6
SCALING = ALPHA / RANK


def test_every_family_of_the_table_is_tested() -> None:
    assert set(FAMILY_CONFIGS) == set(FAMILIES)


def lora_model(folder, **settings) -> nn.Module:
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=HybridExpertsConfig(**settings), dtype=torch.float32
    )
    targets = r".*\.experts\.(gate|up|down)_proj"
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    generator = torch.Generator().manual_seed(11)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        # The router trains too, so that the gradients of the top-k weights are seen.
        p.requires_grad_("lora_" in name or ".mlp.gate." in name)
    return model


class RoutesSeen:
    """The experts that each layer's router chose, as sets per token."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.chosen: dict[str, Tensor] = {}
        for path, module in modules.items():
            path = path.removeprefix("base_model.model.")
            module.register_forward_pre_hook(
                lambda _, args, path=path: self.chosen.update({path: args[1].sort(-1).values})
            )

    def equal(self, other: RoutesSeen) -> bool:
        assert self.chosen.keys() == other.chosen.keys() and self.chosen
        return all(torch.equal(c, other.chosen[path]) for path, c in self.chosen.items())


def inputs_of_equal_routes(ours: nn.Module, stock: nn.Module) -> Tensor:
    """Embeddings [2, 9, D] for which rounding tips no router's decision.

    bf16 products may tip a close one; the results then differ by a whole expert, rightly.
    """
    mine, theirs = RoutesSeen(hybrid_experts_of(ours)), RoutesSeen(stock_experts(stock))
    for seed in range(20):
        embeds = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), ours.disable_adapter():
            ours(inputs_embeds=embeds)
            stock(inputs_embeds=embeds)
        if mine.equal(theirs):
            return embeds
    raise AssertionError("no input of 20 was routed alike")


@pytest.mark.parametrize("weights", ["int8", "bf16"])
@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_logits_and_gradients_equal_stock(family: str, weights: str, tmp_path) -> None:
    original = make_model(family)
    original.save_pretrained(tmp_path)
    ours = lora_model(tmp_path, weights=weights).eval()
    experts = hybrid_experts_of(ours)
    assert len(experts) == len(stock_experts(original)) >= 2
    stock = make_model(family).eval()
    take_effective_weights(stock, ours)

    embeds = inputs_of_equal_routes(ours, stock)
    labels = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(3))
    lora = {
        name.removeprefix("base_model.model.").removesuffix(".default"): p.detach()
        .clone()
        .requires_grad_()
        for name, p in ours.named_parameters()
        if "lora_" in name
    }
    for name, p in stock.named_parameters():
        p.requires_grad_(".mlp.gate." in name)

    ours_in, stock_in = (embeds.clone().requires_grad_() for _ in range(2))
    got = ours(inputs_embeds=ours_in, labels=labels)
    got.loss.backward()
    loss, logits = stock_loss(stock, lora, stock_in, labels, SCALING)
    loss.backward()

    # bf16 products round activations to 8 bits; the error passes two MoE layers and a residual.
    bound = 2 * tolerance("exact" if weights == "int8" else "bf16", 6.0, 6)
    assert_matches(got.logits, logits, bound, "logits")
    assert_matches(ours_in.grad, stock_in.grad, bound, "d_hidden")
    mine = dict(ours.named_parameters())
    checked = 0
    for name, reference in lora.items():
        parameter = mine[f"base_model.model.{name}.default"]
        for e in range(parameter.shape[0]):
            if reference.grad[e].norm() > 1e-3 * reference.grad.norm():
                assert_matches(parameter.grad[e], reference.grad[e], 2 * bound, f"{name}[{e}]")
                checked += 1
    assert checked >= 6 * len(experts)
    routers = 0
    for name, p in stock.named_parameters():
        if p.requires_grad:
            router = mine[f"base_model.model.{name}"]
            assert_matches(router.grad, p.grad, 2 * bound, name)
            routers += 1
    assert routers == len(experts)


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_bf16_model_stays_near_stock(family: str, tmp_path) -> None:
    make_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=HybridExpertsConfig()
    ).eval()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    take_effective_weights(stock, ours)
    assert ours.dtype == torch.bfloat16
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, want = ours(ids).logits.float(), stock(ids).logits
    # bf16 everywhere else: 2^-9 a rounding, some thirty of them along the residual. The median
    # of the tokens, because rounding may tip a router's close decision for one of them.
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(error.median()) < 0.03


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_generate_equals_stock(family: str, tmp_path) -> None:
    make_model(family).save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=HybridExpertsConfig(), dtype=torch.float32
    )
    stock = make_model(family)
    take_effective_weights(stock, ours)
    ids = torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(2))
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(ids, **arguments), stock.eval().generate(ids, **arguments))


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_hybridize_in_memory_equals_loading(family: str, tmp_path) -> None:
    model = make_model(family).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=HybridExpertsConfig(), dtype=torch.float32
    )
    assert hybridize(model, HybridExpertsConfig()) is model
    ids = torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        # Not equal to the bit: torch's own products depend on how memory is aligned.
        assert_matches(model(ids).logits, loaded(ids).logits, tolerance("exact", 6.0, 6))
    for ours, theirs in zip(
        hybrid_experts_of(model).values(), hybrid_experts_of(loaded).values(), strict=True
    ):
        for p in PROJECTIONS:
            assert torch.equal(ours.weights.unpack(3, p), theirs.weights.unpack(3, p))
    assert not any("gate_up_proj" in name for name, _ in model.named_parameters())
