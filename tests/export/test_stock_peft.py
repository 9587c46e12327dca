"""Exported adapters in stock PEFT on stock Transformers, for every family that has the form.

Which forms are tried depends on the installed PEFT: make test-full runs this file on the newest
one, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_cases import FUSED, OLD, adapted, distance, logits, opened, stock, trained
from peft import LoraConfig, PeftModel, get_peft_model
from stock_models import take_effective_weights
from tiny_configs import TINY_FAMILIES, build

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.errors import SettingsError
from kt_sft.export.merge import export_merged
from kt_sft.export.writing import write_adapter

# fp32 products in another order: W + BA, and W x + B (A x), through a few layers.
BOUND = 1e-5
# Without a form: experts in flat matrices.
WITHOUT = {"dbrx"}
# Those that the issue of serving is about, and those with a layout of their own.
USUAL = {
    "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe",
    "qwen3_next", "qwen3_5_moe", "qwen3_vl_moe", "gpt_oss", "granitemoe", "llama4_text",
    "granitemoehybrid", "longcat_flash", "nemotron_h", "aria_text", "minimax_m2",
}  # fmt: skip
# Text alone does not run through them.
NOT_RUN = {"llama4"} if not OLD else set()


def _families() -> list:
    return [
        pytest.param(f, marks=() if f in USUAL else pytest.mark.slow)
        for f in TINY_FAMILIES
        if f not in WITHOUT | NOT_RUN
    ]


@pytest.mark.parametrize("family", _families())
def test_stock_peft_computes_the_same(family: str, tmp_path: Path) -> None:
    adapter = trained(tmp_path, family)
    write_adapter(adapter, FUSED, tmp_path / "out")
    merged = export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    plain, want = logits(stock(tmp_path / "base")), logits(stock(merged))
    assert distance(plain, want) > 0.05, "LoRA must matter"
    loaded = PeftModel.from_pretrained(stock(tmp_path / "base"), str(tmp_path / "out"))
    assert distance(logits(loaded.eval()), want) < BOUND


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"experts.gate_proj": 32, "q_proj": 4}, "rank_pattern": {"down_proj": 2}},
        {"target_modules": ["up_proj"]},
        {"target_modules": ["down_proj", "o_proj"], "lora_dropout": 0.1},
        {"target_modules": r".*layers\.1\..*(gate_proj|up_proj|down_proj|q_proj)"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["rslora", "patterns", "up", "down", "one layer", "head"],
)
def test_settings_are_taken_along(settings: dict, tmp_path: Path) -> None:
    """Ranks, alphas and what is trained in full; a router's choices differ between projections."""
    adapter = trained(tmp_path, "deepseek_v3", **settings)
    write_adapter(adapter, FUSED, tmp_path / "out")
    merged = export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    want = logits(stock(merged))
    loaded = PeftModel.from_pretrained(stock(tmp_path / "base"), str(tmp_path / "out"))
    assert distance(logits(loaded.eval()), want) < BOUND
    assert distance(logits(stock(tmp_path / "base")), want) > 0.01


@pytest.mark.skipif(OLD, reason="PEFT up to 0.18 reads no per-expert keys")
def test_per_expert_keys_where_peft_takes_them(tmp_path: Path) -> None:
    adapter = trained(tmp_path, "olmoe")
    write_adapter(adapter, "peft", tmp_path / "out")
    merged = export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    loaded = PeftModel.from_pretrained(stock(tmp_path / "base"), str(tmp_path / "out"))
    assert distance(logits(loaded.eval()), logits(stock(merged))) < BOUND


@pytest.mark.skipif(OLD, reason="PEFT up to 0.18 reads no per-expert keys")
@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"experts.gate_proj": 64}, "rank_pattern": {"experts.up_proj": 2}},
        {"target_modules": ["up_proj", "q_proj"]},
        {"target_modules": ["gate_proj", "down_proj"], "use_rslora": True},
    ],
)
def test_per_expert_keys_with_one_rank_and_all_projections(settings: dict, tmp_path: Path) -> None:
    """What PEFT makes of patterns by projection, and of some projections alone, is wrong."""
    adapter = trained(tmp_path, "olmoe", **settings)
    write_adapter(adapter, "peft", tmp_path / "out")
    merged = export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    loaded = PeftModel.from_pretrained(stock(tmp_path / "base"), str(tmp_path / "out"))
    assert distance(logits(loaded.eval()), logits(stock(merged))) < BOUND


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_per_expert_keys_are_refused_where_peft_drops_them(family: str, tmp_path: Path) -> None:
    adapter = trained(tmp_path, family)
    with pytest.raises(SettingsError, match=r"stock PEFT drops .*; use --to peft-fused"):
        write_adapter(adapter, "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial*"))


@pytest.mark.skipif(not OLD, reason="the newest Transformers has the experts where they belong")
@pytest.mark.parametrize("family", ["granitemoe", "aria_text", "nemotron_h"])
def test_experts_that_have_moved_since(family: str, tmp_path: Path) -> None:
    """What PEFT on a newer Transformers would not find, and drop without an error."""
    with pytest.raises(SettingsError, match=r"has moved the experts of .* since 5\."):
        write_adapter(trained(tmp_path, family), "peft-fused", tmp_path / "out")


def test_flat_experts_have_no_form(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="which PEFT's target_parameters need; use --to merged"):
        write_adapter(trained(tmp_path, "dbrx"), FUSED, tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_adapters_that_stock_peft_has_made(family: str, tmp_path: Path) -> None:
    """Made with target_parameters, as Unsloth and ms-swift do: merged and continued by us."""
    base = build(family)
    # int8 experts of these are the same again.
    take_effective_weights(base, hybridize(build(family), HybridExpertsConfig(threads=1)))
    base.save_pretrained(tmp_path / "base")
    layer = "feed_forward" if family == "llama4_text" else "mlp"
    parameters = [f"{layer}.experts.gate_up_proj", f"{layer}.experts.down_proj"]
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj"], target_parameters=parameters)
    theirs = get_peft_model(stock(tmp_path / "base"), config).eval()
    generator = torch.Generator().manual_seed(2)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    want = logits(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = opened(tmp_path)
    assert adapter.layouts == {"fused"}
    merged = export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert distance(logits(stock(merged)), want) < BOUND
    write_adapter(adapter, "kt_sft", tmp_path / "ours")
    hybrid = adapted(base).unload()
    continued = PeftModel.from_pretrained(hybrid, str(tmp_path / "ours"), is_trainable=True)
    assert distance(logits(continued.eval()), want) < 2e-3  # activations in 16 bits


@pytest.mark.slow
@pytest.mark.skipif(not OLD, reason="is what runs this file on the newest one")
def test_on_the_newest_peft_and_transformers(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path)]
    subprocess.run([*install, "huggingface-hub", "tokenizers", "safetensors"], check=True)
    subprocess.run([*install, "--no-deps", "peft", "transformers"], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "DISABLE_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
