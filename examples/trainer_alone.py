"""Fine-tunes with the Trainer of Transformers and PEFT alone, without LLaMA-Factory.

    python examples/trainer_alone.py MODEL --out outputs/trainer_alone

MODEL is a folder, or a name of the Hub. The experts are read from the checkpoint straight into
packed host memory: the whole model is never in memory.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import kt_sft

TEXTS = [f"{n} and {n} are {2 * n}." for n in range(64)]


def main() -> None:
    """Trains for some steps and saves the adapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        quantization_config=kt_sft.HybridExpertsConfig(weights="int8"),
        dtype=torch.bfloat16,
    )
    # Attention, and the three projections of every expert.
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in TEXTS]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=1,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[kt_sft.HybridExpertsCallback()],
    )
    trainer.train()
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
