"""Moves the experts of a model that is loaded into packed host memory, and compares its answers.

python examples/hybridize_loaded_model.py MODEL --weights int8
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kt_sft


def main() -> None:
    """Prints how far the logits move, and what the experts take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--weights", default="int8", help="int8, int4 or bf16")
    parser.add_argument("--text", default="The quick brown fox jumps over the lazy dog.")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(arguments.text, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    with torch.no_grad():
        before = model(ids).logits
        kt_sft.hybridize(model, kt_sft.HybridExpertsConfig(weights=arguments.weights))
        after = model(ids).logits
    same = (before.argmax(-1) == after.argmax(-1)).float().mean()
    apart = (before - after).norm() / before.norm()
    sys.stdout.write(
        f"{arguments.weights}: logits differ by {float(apart):.2%}, "
        f"{float(same):.0%} of the next tokens are the same\n"
    )


if __name__ == "__main__":
    main()
