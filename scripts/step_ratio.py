"""What keeping the experts' activations saves: training steps with `keep` and `recompute`.

    python scripts/step_ratio.py [--tokens 1024] [--layers 4] [--rounds 9]

One Qwen3-MoE of the given size with LoRA on attention and experts, gradient checkpointing, and
AdamW. The two settings take turns, step by step; medians of their times and of the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.experts import hybrid_experts_of
from kt_sft.machine.report import cpu_name

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _model(arguments: argparse.Namespace, activations: str) -> nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden,
        moe_intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
    )
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    settings = HybridExpertsConfig(activations=activations, threads=arguments.threads)
    model = get_peft_model(
        hybridize(stock, settings), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    )
    model.enable_input_require_grads()
    kind = {"use_reentrant": not arguments.non_reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
    return model.train()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def main() -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {
        "tokens": 1024, "layers": 4, "hidden": 1024, "intermediate": 768, "experts": 32,
        "top_k": 8, "threads": 2, "rounds": 9,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--non-reentrant", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    length = min(256, arguments.tokens)
    ids = torch.randint(0, 512, (arguments.tokens // length, length))
    models = {name: _model(arguments, name) for name in ("keep", "recompute")}
    optimizers = {
        name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4)
        for name, m in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(arguments.rounds + 1):
        for name, model in models.items():
            taken = _step(model, optimizers[name], ids)
            if turn:  # the first warms up
                seconds[name].append(taken)
    ratios = [a / b for a, b in zip(seconds["keep"], seconds["recompute"], strict=True)]
    sys.stdout.write(f"{cpu_name()}, {arguments.threads} threads, {vars(arguments)}\n")
    for name, model in models.items():
        runtime = next(iter(hybrid_experts_of(model).values())).runtime
        reading = runtime.meter.read()
        experts = (reading.forward + reading.backward) / (arguments.rounds + 1)
        sys.stdout.write(
            f"{name:<10} step {1e3 * statistics.median(seconds[name]):7.1f} ms, experts "
            f"{1e3 * experts:7.1f} ms, forwards per backward {reading.forwards_per_backward:.2f}, "
            f"kept {runtime.kept.peak / 1e6:.1f} MB\n"
        )
    sys.stdout.write(f"keep / recompute: {statistics.median(ratios):.3f}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
