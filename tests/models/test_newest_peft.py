"""An adapter of ours on stock Transformers with the newest PEFT that the registry gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_model, take_effective_weights
from transformers import AutoModelForCausalLM

from kt_sft import HybridExpertsConfig

_READER = """
import json, sys
import peft, torch, transformers
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
ids = torch.arange(24).reshape(2, 12) * 7 % 300
with torch.no_grad():
    plain = model(ids).logits
    loaded = peft.PeftModel.from_pretrained(model, adapter).eval()
    adapted = loaded(ids).logits
torch.save({"plain": plain, "adapted": adapted}, out)
print(json.dumps({"peft": peft.__version__, "transformers": transformers.__version__}))
"""


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the newest PEFT and Transformers, which goes before the installed ones.

    Their light dependencies come along; torch is the installed one.
    """
    folder = tmp_path_factory.mktemp("newest")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    subprocess.run([*install, "huggingface-hub", "tokenizers", "safetensors"], check=True)
    subprocess.run([*install, "--no-deps", "peft", "transformers"], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], None])
def test_newest_peft_reads_the_adapter(
    newest: Path, tmp_path: Path, family: str, targets: list[str] | None
) -> None:
    targets = targets or ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    stock = make_model(family)
    stock.save_pretrained(tmp_path / "raw")
    hybrid = AutoModelForCausalLM.from_pretrained(
        tmp_path / "raw", quantization_config=HybridExpertsConfig(), dtype=torch.float32
    )
    take_effective_weights(stock, hybrid)
    stock.save_pretrained(tmp_path / "base")
    model = get_peft_model(hybrid, LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.2
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(24).reshape(2, 12) * 7 % 300
    with torch.no_grad():
        want = model(ids).logits

    done = subprocess.run(
        [sys.executable, "-c", _READER, *(str(tmp_path / n) for n in ("base", "adapter", "out"))],
        env={**os.environ, "PYTHONPATH": str(newest), "KT_SFT_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    versions = json.loads(done.stdout.strip().splitlines()[-1])
    assert tuple(map(int, versions["peft"].split(".")[:2])) >= (0, 19), versions
    got = torch.load(tmp_path / "out", weights_only=True)
    assert float((got["plain"] - want).norm() / want.norm()) > 0.05, "LoRA must matter"
    assert float((got["adapted"] - want).norm() / want.norm()) < 1e-3, versions


@pytest.mark.slow
def test_hybrid_models_on_the_newest_peft(newest: Path) -> None:
    """Adapters made, refused, saved, loaded, switched and exported as on the pinned release."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         *(str(here / name) for name in ("test_adapters.py", "test_peft_injection.py"))],
        env={**os.environ, "PYTHONPATH": str(newest), "DISABLE_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
