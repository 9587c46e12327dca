"""A dense model made into a Mixture of Experts computes what it did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import upcycle

from kt_sft import HybridExpertsConfig

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 5000.0,
}  # fmt: skip
IDS = torch.arange(40).view(2, 20)


def dense(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, p.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (4, 1), (3, 3)])
def test_the_function_is_preserved(tied: bool, experts: int, top_k: int) -> None:
    model = dense(tied)
    sparse = upcycle.upcycled(model, experts, top_k).eval()
    torch.testing.assert_close(sparse(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert sparse.config.tie_word_embeddings == tied
    chosen = {tuple(row) for row in (sparse.model.layers[0].mlp.gate.weight @ torch.randn(64, 50))
              .topk(top_k, dim=0).indices.T.tolist()}  # fmt: skip
    assert top_k == experts or len(chosen) > 1, "the router sends every token to the same experts"


def test_a_window_is_kept() -> None:
    torch.manual_seed(1)
    config = MistralConfig(**SIZES, sliding_window=6, attn_implementation="eager")
    model = MistralForCausalLM(config).eval()
    sparse = upcycle.upcycled(model, 4, 2).eval()
    assert sparse.config.sliding_window == 6
    torch.testing.assert_close(sparse(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_noise_makes_experts_differ_and_costs_a_little() -> None:
    model = dense()
    sparse = upcycle.upcycled(model, 4, 2, noise=0.02).eval()
    weights = sparse.model.layers[0].mlp.experts.down_proj
    assert not torch.equal(weights[0], weights[1])
    difference = (sparse(IDS).logits - model(IDS).logits).norm() / model(IDS).logits.norm()
    assert 1e-4 < difference < 0.1


def test_what_is_no_llama_is_refused() -> None:
    for config, model_class in (
        (Qwen2Config(**SIZES), Qwen2ForCausalLM),
        (GraniteConfig(**SIZES), GraniteForCausalLM),  # the same names, another arithmetic
    ):
        with pytest.raises(ValueError, match=f"'{config.model_type}' cannot become a Mixtral"):
            upcycle.upcycled(model_class(config), 4, 2)
    biased = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True))
    with pytest.raises(ValueError, match="with attention_bias cannot become"):
        upcycle.upcycled(biased, 4, 2)
    with pytest.raises(ValueError, match="top_k: got 5, expected 1 to 4"):
        upcycle.upcycled(dense(), 4, 5)


def test_the_command_writes_what_loads(tmp_path: Path) -> None:
    model = dense().bfloat16()
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer(tmp_path / "dense")
    command = [sys.executable, upcycle.__file__, str(tmp_path / "dense"), str(tmp_path / "sparse")]
    done = subprocess.run([*command, "--experts", "4"], capture_output=True, text=True)
    assert done.returncode == 0 and "4 experts a layer" in done.stdout, done.stderr[-2000:]
    hybrid = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", quantization_config=HybridExpertsConfig(weights="bf16")
    )
    difference = (hybrid(IDS).logits - model(IDS).logits).float().norm()
    assert difference / model(IDS).logits.float().norm() < 0.05
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "is not empty" in again.stderr
