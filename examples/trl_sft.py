"""Fine-tunes with TRL's SFTTrainer.

    python examples/trl_sft.py MODEL --out outputs/trl_sft

(TRL 0.24, which LLaMA-Factory 0.9.5 asks for, cannot import its DPOTrainer beside Transformers 5 by
itself; a recipe with `stage: dpo` can.)
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import kt_sft

ROWS = [{"prompt": f"{n} and {n} are", "completion": f" {2 * n}."} for n in range(64)]


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
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            max_length=64,
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        ),
        callbacks=[kt_sft.HybridExpertsCallback()],
    )
    trainer.train()
    trainer.save_model(arguments.out)


if __name__ == "__main__":
    main()
