"""Prints what the memory plan says of large models on a small device, without their weights.

    python scripts/device_plan.py [--model deepseek_v3 | qwen3_30b] [--tokens 2048 ...]

LoRA of rank 8 on everything, gradient checkpointing that holds the layers' inputs on the host
(`use_unsloth_gc`); for each form of what stays on the device and each place of the experts'
adapters. `--fused-loss` is `enable_liger_kernel`, without which the logits of long sequences take
the most.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from kt_sft.config import HybridExpertsSettings
from kt_sft.experts import ExpertsRuntime
from kt_sft.families.finding import FoundExperts, find_experts
from kt_sft.kernels import WeightLayout
from kt_sft.loading.quantized_rest import QuantizedRest
from kt_sft.loading.swap import swap_experts
from kt_sft.planning.lora_targets import LoraTargets
from kt_sft.planning.outline import Surroundings, TrainingOutline, plan_of

MODELS = {
    "deepseek_v3": ("deepseek_v3", {}),
    "qwen3_30b": ("qwen3_moe", {
        "vocab_size": 151_936, "hidden_size": 2048, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    }),
}  # fmt: skip
# Room for everything, so that nothing is decided by it.
ROOM = Surroundings("portable", 2, 1 << 50, True, 1 << 50)
FORMS: dict[str, BitsAndBytesConfig | None] = {
    "bf16": None,
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "4 bits": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
}


def _unread(layer: FoundExperts) -> WeightLayout:
    raise AssertionError(f"{layer.path}: its own form is not asked for")


def rows_of(arguments: argparse.Namespace) -> list[str]:
    """A line for each form, place of the adapters and length."""
    model_type, sizes = MODELS[arguments.model]
    lines = []
    for form, rest in FORMS.items():
        with torch.device("meta"):
            config = AutoConfig.for_model(model_type, **sizes)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        layers = find_experts(model)
        settings = HybridExpertsSettings(weights=arguments.weights)
        swap_experts(model, layers, ExpertsRuntime(settings))
        nbytes = None
        if rest is not None:
            quantized = QuantizedRest(rest)
            quantized.replace_layers(model, {"": 0})
            nbytes = quantized.parameter_bytes(model, 2)
        for adapters in ("device", "host"):
            chosen = HybridExpertsSettings(
                weights=arguments.weights,
                adapters=adapters,
                activations=arguments.activations,
                embeddings=arguments.embeddings,
            )
            for length in arguments.tokens:
                outline = TrainingOutline(
                    length, 8, LoraTargets.of("all"), offloads=True, fused_loss=arguments.fused_loss
                )
                plan = plan_of(model, layers, _unread, chosen, outline, nbytes, ROOM)
                lines.append(
                    f"| {form} | {adapters} | {length:,} | {plan.of('device') / 1e9:.1f} GB "
                    f"| {plan.host_bytes / 1e9:.1f} GB |"
                )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """A Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="deepseek_v3")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--weights", default="int4", help="of the routed experts")
    parser.add_argument("--fused-loss", action="store_true")
    parser.add_argument("--activations", choices=("keep", "recompute"), default="keep")
    parser.add_argument("--embeddings", choices=("device", "host"), default="device")
    arguments = parser.parse_args(argv)
    heads = ("beside the experts", "adapters", "tokens", "device", "host")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += rows_of(arguments)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
