"""Writes an adapter for stock PEFT and loads it there, without kt_sft in the model.

python examples/adapter_to_peft.py MODEL ADAPTER --out outputs/adapter_to_peft
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import peft
import torch
from packaging.version import Version
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import kt_sft


def logits(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Of one text."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits
    return found


def main() -> None:
    """Prints how far stock PEFT's logits are from those of the hybrid model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    # Up to 0.18 PEFT had the factors of fused experts the other way round.
    form = "peft-fused" if Version(peft.__version__) >= Version("0.19") else "peft-fused-0.18"
    words = ["--to", form, "--out", arguments.out, "--base", arguments.model]
    subprocess.run(["kt-sft", "export", arguments.adapter, *words], check=True)
    ids = AutoTokenizer.from_pretrained(arguments.model)("2 and 2 are", return_tensors="pt")
    stock = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    there = logits(PeftModel.from_pretrained(stock, arguments.out), ids["input_ids"])
    hybrid = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        quantization_config=kt_sft.HybridExpertsConfig(weights="bf16"),
        dtype=torch.float32,
    )
    here = logits(PeftModel.from_pretrained(hybrid, arguments.adapter), ids["input_ids"])
    apart = (here - there).norm() / there.norm()
    sys.stdout.write(f"stock PEFT and the hybrid model differ by {float(apart):.2%}\n")


if __name__ == "__main__":
    main()
