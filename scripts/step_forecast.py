"""The time of a step against what `kt-sft plan` says of it, on models made here.

    python scripts/step_forecast.py
    python scripts/step_forecast.py --shape wide

Each shape trains in a process of its own on the CPU, LoRA of rank 8 on everything, gradient
checkpointing, AdamW; the median of the steps after the first.
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
STEPS = 5


def measure(name: str) -> dict[str, float]:
    """Seconds of a step, predicted and measured, in this process."""
    shape = SHAPES[name]
    memory_plan.SHAPES[name] = shape
    with tempfile.TemporaryDirectory() as folder:
        maker = multiprocessing.get_context("fork").Process(
            target=memory_plan.make, args=(name, folder)
        )
        maker.start()
        maker.join()
        predicted = _predicted(shape, folder)
        config = HybridExpertsConfig(
            store="memory", weights=shape.weights, activations=shape.activations
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=shape.config(), quantization_config=config, dtype=torch.bfloat16
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=8, target_modules=list(shape.targets))).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained)
    seconds = []
    for _ in range(STEPS):
        ids = torch.randint(0, shape.vocabulary, (shape.sequences, shape.length))
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"predicted": predicted, "measured": statistics.median(seconds[1:])}


def _predicted(shape: Shape, folder: str) -> float:
    recipe = {
        "model_name_or_path": folder,
        "do_train": True,
        "bf16": True,
        "cutoff_len": shape.length,
        "per_device_train_batch_size": shape.sequences,
        "kt_sft": {"weights": shape.weights, "activations": shape.activations},
    }
    return ask(question_of(recipe, None, None)).step.seconds


def main() -> None:
    """All shapes, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES)
    options = parser.parse_args()
    if options.shape:
        print(json.dumps(measure(options.shape)))
        return
    print("| shape | predicted ms | measured ms | measured / predicted |\n|---|---|---|---|")
    for name, found in each_in_a_process(__file__, SHAPES):
        predicted, measured = 1e3 * found["predicted"], 1e3 * found["measured"]
        ratio = measured / predicted
        print(f"| {name} | {predicted:.0f} | {measured:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
