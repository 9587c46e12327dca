"""Memory that a training takes against what its plan says, on models made here.

    python scripts/memory_plan.py
    python scripts/memory_plan.py --shape long_batch

Each shape is trained in a process of its own, on the CPU. Measured is the largest anonymous memory
above what the process had before the model, with the experts packed in its memory. The C library
is told what kt_sft tells it where memory is short, to hand back what is freed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from kt_sft import HybridExpertsConfig
from kt_sft.loading import quantizer as loading
from kt_sft.machine import allocator
from kt_sft.machine.memory import anonymous_memory_bytes, host_memory_bytes, peak_memory_bytes
from kt_sft.planning.lora_targets import LoraTargets
from kt_sft.planning.outline import TrainingOutline

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A model and a training of it."""

    hidden: int = 512
    intermediate: int = 512
    experts: int = 8
    layers: int = 4
    sequences: int = 1
    length: int = 512
    rank: int = 8
    top_k: int = 2
    vocabulary: int = 512
    weights: str = "int8"
    activations: str = "keep"
    checkpointing: bool = True
    expert_lora: bool | str = True
    targets: tuple[str, ...] = (*ATTENTION, *EXPERTS)
    trained: tuple[str, ...] = ()

    def config(self) -> Qwen3MoeConfig:
        """The model's configuration."""
        return Qwen3MoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            num_hidden_layers=self.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=self.hidden // 8,
        )


SHAPES = {
    "one_sequence": Shape(length=4096),
    "many_sequences": Shape(sequences=8, layers=6),
    "long_batch": Shape(sequences=8, length=2048, layers=3, intermediate=256),
    "recomputed": Shape(sequences=4, layers=6, top_k=4, activations="recompute"),
    "not_checkpointed": Shape(sequences=4, layers=3, checkpointing=False),
    "wide": Shape(hidden=2048, layers=2, length=2048),
    "deep": Shape(hidden=256, intermediate=256, layers=24, sequences=2),
    "lora": Shape(experts=64, rank=32, top_k=4, length=256),
    "shared_lora": Shape(experts=32, rank=64, expert_lora="shared", length=1024),
    "no_expert_lora": Shape(experts=32, sequences=2, expert_lora=False, targets=ATTENTION),
    "weights": Shape(hidden=1024, intermediate=2048, experts=32, rank=4, length=128),
    "int4": Shape(hidden=1024, intermediate=1024, experts=32, weights="int4", length=1024),
    "bf16": Shape(hidden=768, experts=24, weights="bf16", sequences=3, length=384),
    "vocabulary": Shape(vocabulary=32_000, length=1024, trained=("lm_head",)),
    "top_k": Shape(experts=16, top_k=8, intermediate=768, sequences=2, length=1024),
}


class Peak:
    """The most anonymous memory of this process from here on, as the system records it."""

    def __init__(self) -> None:
        self._start = anonymous_memory_bytes()
        self._loading = 0

    def loaded(self) -> None:
        """After the model was read from mapped files, which are no memory of the process."""
        self._loading = anonymous_memory_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now

    @property
    def grown(self) -> int:
        """Bytes above the start."""
        mapped = host_memory_bytes() - anonymous_memory_bytes()
        return max(self._loading, peak_memory_bytes() - mapped) - self._start


def measure(name: str) -> dict[str, float]:
    """Planned and measured bytes of one shape, in this process."""
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        # In a process of its own, so that its memory is not counted.
        maker = multiprocessing.get_context("fork").Process(target=make, args=(name, folder))
        maker.start()
        maker.join()
        assert maker.exitcode == 0, "the model was not made"
        quantization = HybridExpertsConfig(
            store="memory",
            weights=shape.weights,
            activations=shape.activations,
            expert_lora=shape.expert_lora,
        )
        quantization.outline = TrainingOutline(
            shape.sequences * shape.length,
            shape.rank,
            LoraTargets.of(*shape.targets),
            frozenset(shape.trained),
            checkpointing=shape.checkpointing,
            on_host=True,
        )
        plans = []
        check = loading.check_memory
        loading.check_memory = lambda plan, settings: plans.append(plan) or check(plan, settings)
        torch.set_num_threads(1)
        allocator.return_freed_blocks()
        # What the first use of every library takes is not the model's.
        torch.ones(64, 64, requires_grad=True).matmul(torch.ones(64, 64)).sum().backward()
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
        peak = Peak()
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=shape.config(), quantization_config=quantization, dtype=torch.bfloat16
        )
        peak.loaded()
        if shape.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        lora = LoraConfig(
            r=shape.rank,
            target_modules=list(shape.targets),
            modules_to_save=list(shape.trained) or None,
        )
        model = get_peft_model(model, lora).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(trained, foreach=False)
        for _ in range(2):  # the second one has the optimizer's state
            ids = torch.randint(0, shape.vocabulary, (shape.sequences, shape.length))
            with torch.autocast("cpu", torch.bfloat16):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    (plan,) = plans
    return {"planned": float(plan.host_bytes), "measured": float(peak.grown)}


def make(name: str, folder: str) -> None:
    """Writes the model of a shape."""
    torch.set_num_threads(1)
    config = SHAPES[name].config()
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def each_in_a_process(script: str, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What `script --shape NAME` prints last, for each name."""
    for name in names:
        done = subprocess.run(
            [sys.executable, script, "--shape", name],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        yield name, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """All shapes, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES)
    options = parser.parse_args()
    if options.shape:
        print(json.dumps(measure(options.shape)))
        return
    print("| shape | planned MB | measured MB | measured / planned |\n|---|---|---|---|")
    for name, got in each_in_a_process(__file__, SHAPES):
        planned, measured = got["planned"], got["measured"]
        print(
            f"| {name} | {planned / 1e6:.0f} | {measured / 1e6:.0f} | {measured / planned:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
