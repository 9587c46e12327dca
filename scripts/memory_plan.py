"""Memory that a training takes against what its plan says, on models made here.

    python scripts/memory_plan.py

Each shape is trained in a process of its own. Measured is the largest anonymous memory above what
the process had before the model, looked at every 2 ms, with the experts packed in its memory and
the C library told to give freed memory back at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from kt_sft import HybridExpertsConfig
from kt_sft.host import anonymous_memory_bytes
from kt_sft.integrations import transformers as loading
from kt_sft.integrations.memory import TrainingOutline

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# hidden, intermediate, experts, layers, sequences, length, activations, rank
SHAPES = {
    "activations": (512, 768, 16, 6, 4, 512, "keep", 8),
    "recomputed": (512, 768, 16, 6, 4, 512, "recompute", 8),
    "lora": (512, 768, 64, 4, 1, 256, "keep", 32),
    "weights": (1024, 1024, 32, 6, 1, 128, "keep", 4),
    "tokens": (1024, 512, 8, 4, 4, 1024, "keep", 8),
}
# glibc keeps what is freed in blocks of less than 32 MB; planned is what is in use.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "1048576"}


class Peak:
    """The largest anonymous memory of this process, followed by a thread."""

    def __init__(self) -> None:
        self.start = self.largest = anonymous_memory_bytes()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while True:
            self.largest = max(self.largest, anonymous_memory_bytes())
            time.sleep(0.002)

    @property
    def grown(self) -> int:
        """Bytes above the start."""
        return self.largest - self.start


def config_of(name: str) -> Qwen3MoeConfig:
    """The configuration of a shape."""
    hidden, intermediate, experts, layers, *_ = SHAPES[name]
    return Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        num_experts=experts,
        num_experts_per_tok=4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
    )


def measure(name: str) -> dict[str, float]:
    """Planned and measured bytes of one shape, in this process."""
    *_, sequences, length, activations, rank = SHAPES[name]
    config = config_of(name)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        subprocess.run([sys.executable, __file__, "--make", name, "--folder", folder], check=True)
        quantization = HybridExpertsConfig(store="memory", activations=activations)
        quantization.outline = TrainingOutline(sequences * length, rank, frozenset(TARGETS))
        plans = []
        check = loading.check_memory
        loading.check_memory = lambda plan, settings: plans.append(plan) or check(plan, settings)
        torch.set_num_threads(1)
        # What the first use of every library takes is not the model's.
        torch.ones(64, 64, requires_grad=True).matmul(torch.ones(64, 64)).sum().backward()
        peak = Peak()
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, quantization_config=quantization, dtype=torch.bfloat16
        )
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=TARGETS)).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(trained, foreach=False)
        for _ in range(3):
            ids = torch.randint(0, 512, (sequences, length))
            with torch.autocast("cpu", torch.bfloat16):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    (plan,) = plans
    return {"planned": float(plan.host_bytes), "measured": float(peak.grown)}


def make(name: str, folder: str) -> None:
    """Writes the model of a shape; a process of its own, so that its memory is not counted."""
    AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16).save_pretrained(folder)


def main() -> None:
    """All shapes, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--make", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, str(options.folder))
        return
    if options.shape:
        print(json.dumps(measure(options.shape)))
        return
    print("| shape | planned MB | measured MB | measured / planned |\n|---|---|---|---|")
    for name in SHAPES:
        done = subprocess.run(
            [sys.executable, __file__, "--shape", name],
            stdout=subprocess.PIPE,
            env={**os.environ, **_GIVE_BACK},
            text=True,
            check=True,
        )
        got = json.loads(done.stdout.splitlines()[-1])
        planned, measured = got["planned"], got["measured"]
        print(f"| {name} | {planned / 1e6:.0f} | {measured / 1e6:.0f} | {measured / planned:.2f} |")


if __name__ == "__main__":
    main()
