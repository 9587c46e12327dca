"""The time of a step against what `kt-sft plan` says of it, on models made here.

    python scripts/step_forecast.py
    python scripts/step_forecast.py --shape wide

Each shape trains in a process of its own on the CPU, LoRA of rank 8 on everything, gradient
checkpointing, AdamW. Forecasts and steps take turns; cells are medians, predicted / measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time

import memory_plan
import torch
from memory_plan import Shape, each_in_a_process
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from kt_sft import HybridExpertsConfig
from kt_sft.cli.plan import question_of
from kt_sft.experts import hybrid_experts_of
from kt_sft.forecast.forecast import ask

SHAPES = {
    "wide": Shape(
        hidden=2048, intermediate=768, experts=64, layers=3, top_k=8, length=1024, vocabulary=16_384
    ),
    "deep, recomputed": Shape(
        hidden=1024, intermediate=512, experts=32, layers=8, top_k=4, length=512, sequences=2,
        vocabulary=8192, activations="recompute",
    ),
    "long": Shape(
        hidden=2048, intermediate=1408, experts=64, layers=2, top_k=6, length=2048,
        vocabulary=32_000,
    ),
    "few tokens": Shape(
        hidden=2048, intermediate=1024, experts=64, layers=3, top_k=8, length=64, vocabulary=8192
    ),
}  # fmt: skip
ROUNDS, STEPS = 5, 4
PARTS = ("experts", "other layers", "optimizer")
Seconds = dict[str, float]


def measure(name: str) -> list[tuple[Seconds, Seconds]]:
    """(predicted, measured) seconds of a step by part, in this process, once for each round."""
    shape = SHAPES[name]
    memory_plan.SHAPES[name] = shape
    with tempfile.TemporaryDirectory() as folder:
        maker = multiprocessing.get_context("fork").Process(
            target=memory_plan.make, args=(name, folder)
        )
        maker.start()
        maker.join()
        training = Training(shape, folder)
        training.step()
        found = []
        for _ in range(ROUNDS):
            predicted = _predicted(shape, folder)
            steps = [training.step() for _ in range(STEPS)]
            found.append((predicted, {p: statistics.median(s[p] for s in steps) for p in PARTS}))
    return found


class Training:
    """A plain loop as the Trainer has it: autocast, clipped gradients, AdamW."""

    def __init__(self, shape: Shape, folder: str) -> None:
        config = HybridExpertsConfig(
            store="memory", weights=shape.weights, activations=shape.activations
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=shape.config(), quantization_config=config, dtype=torch.bfloat16
        )
        self.meter = next(iter(hybrid_experts_of(model).values())).runtime.meter
        model.gradient_checkpointing_enable({"use_reentrant": False})
        lora = LoraConfig(r=8, target_modules=list(shape.targets))
        self.model, self.shape = get_peft_model(model, lora).train(), shape
        self.trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, fused=True)

    def step(self) -> Seconds:
        """Of one, by part."""
        shape = self.shape
        ids = torch.randint(0, shape.vocabulary, (shape.sequences, shape.length))
        self.meter.read()
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        middle = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        reading = self.meter.read()
        experts = reading.forward + reading.backward
        times = (experts, middle - start - experts, end - middle)
        return dict(zip(PARTS, times, strict=True))


def _predicted(shape: Shape, folder: str) -> Seconds:
    recipe = {
        "model_name_or_path": folder,
        "do_train": True,
        "bf16": True,
        "use_cpu": True,
        "cutoff_len": shape.length,
        "per_device_train_batch_size": shape.sequences,
        "kt_sft": {"weights": shape.weights, "activations": shape.activations},
    }
    parts = ask(question_of(recipe, None, None)).step.parts
    return {name: sum(s for p, s in parts.items() if p.startswith(name)) for name in PARTS}


def main() -> None:
    """All shapes, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES)
    options = parser.parse_args()
    if options.shape:
        print(json.dumps({"rounds": measure(options.shape)}))
        return
    parts = " | ".join(f"{part}, ms" for part in PARTS)
    print(f"| shape | {parts} | a step, ms | measured / predicted |")
    print("|---|" + "---|" * (len(PARTS) + 2))
    for name, found in each_in_a_process(__file__, SHAPES):
        cells, totals = [], [[sum(s.values()) for s in pair] for pair in found["rounds"]]
        for part in PARTS:
            both = zip(*((pair[0][part], pair[1][part]) for pair in found["rounds"]), strict=True)
            cells.append(" / ".join(f"{1e3 * statistics.median(times):.0f}" for times in both))
        predicted, measured = map(statistics.median, zip(*totals, strict=True))
        ratios = sorted(after / before for before, after in totals)
        ratio = f"{measured / predicted:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        whole = f"{1e3 * predicted:.0f} / {1e3 * measured:.0f}"
        print(f"| {name} | {' | '.join(cells)} | {whole} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
