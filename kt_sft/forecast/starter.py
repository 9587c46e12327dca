"""A first recipe for a model on a machine: what is planned of it, and a word on each setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from kt_sft.forecast.forecast import Forecast


@dataclass(frozen=True)
class Goal:
    """What a recipe trains for. dataset: one of LLaMA-Factory's own, to begin with."""

    stage: str
    title: str
    dataset: str
    learning_rate: str
    settings: Mapping[str, str]


GOALS = {
    "sft": Goal("sft", "supervised fine-tuning", "alpaca_en_demo", "1.0e-4", {}),
    "dpo": Goal(
        "dpo", "preference training (DPO)", "dpo_en_demo", "5.0e-6",
        {"pref_beta": "0.1", "pref_loss": "sigmoid        # or orpo, simpo, ..."},
    ),
    "kto": Goal("kto", "training on good and bad answers (KTO)", "kto_en_demo", "5.0e-6",
                {"pref_beta": "0.1"}),
    "pt": Goal("pt", "continued pre-training", "c4_demo", "1.0e-4",
               {"packing": "true             # texts one after the other in each sequence"}),
}  # fmt: skip

# What the section says of a setting that is not the default's.
_WHY = {
    "weights": "of the routed experts: int8, int4, bf16, or checkpoint: as published",
    "adapters": "LoRA of the experts and its optimizer in host memory",
    "embeddings": "the table of input embeddings in host memory",
    "activations": "the experts' forward is computed twice, for less memory",
    "expert_lora": "one pair of matrices for all experts of a layer",
    "disk_tier": "experts that do not fit memory come from the disk in every pass",
    "use_unsloth_gc": "inputs of the layers in host memory",
    "quantization_bit": "everything but the routed experts, by bitsandbytes",
}
_COLUMN = 28


def starter(
    forecast: Forecast, model: str, goal: Goal, template: str | None, name: str, made: str
) -> str:
    """The recipe's text. forecast: of the recipe with all that it needs; made: the command."""
    question = forecast.question
    outline, plan = question.outline, forecast.plan
    assert outline is not None
    subject = question.subject
    memory = f"host {plan.host_bytes / 1e9:.0f} GB"
    if question.machine.device is not None:
        memory += f", accelerator {plan.of('device') / 1e9:.1f} GB"
    section: dict[str, Any] = {"weights": question.settings.weights}
    defaults = type(question.settings)()
    for key, value in question.settings.as_dict().items():
        if value != getattr(defaults, key):
            section[key] = value
    lines = [
        f"# {subject.name}: {goal.title}, LoRA of rank {outline.rank} on attention and experts.",
        "#",
        f"# Made by:  {made}",
        f"# Run:      llamafactory-cli train {name}.yaml",
        f"# Data:     {goal.dataset} of LLaMA-Factory's repository; name your own below",
        f"# Memory:   planned: {memory} (kt-sft plan {name}.yaml)",
        f"# Speed:    estimated: {forecast.step.tokens_per_second:,.0f} tokens a second on",
        f"#           {question.machine.name}",
        "",
        "### model",
        yaml.safe_dump({"model_name_or_path": model}, width=10_000).strip(),
        "flash_attn: sdpa",
    ]
    if subject.rest_bytes is not None:
        lines.append(_line("quantization_bit", 4, _WHY["quantization_bit"]))
    if outline.offloads:
        lines.append(_line("use_unsloth_gc", True, _WHY["use_unsloth_gc"]))
    lines.append("kt_sft:")
    lines += [f"  {_line(key, value, _WHY.get(key, ''))}" for key, value in section.items()]
    lines += [
        "",
        "### method",
        f"stage: {goal.stage}",
        "do_train: true",
        "finetuning_type: lora",
        _line("lora_target", "all", "or names: q_proj,v_proj,gate_proj,up_proj,down_proj"),
        f"lora_rank: {outline.rank}",
        f"lora_alpha: {2 * outline.rank}",
        *(f"{key}: {value}" for key, value in goal.settings.items()),
        "",
        "### data",
        _line("dataset", goal.dataset, "names in dataset_info.json of dataset_dir"),
        _line("dataset_dir", "data", "a folder of yours"),
        *_template(goal, template),
        _line("cutoff_len", question.length, "tokens; longer samples are cut"),
        "preprocessing_num_workers: 4",
        "",
        "### output",
        f"output_dir: outputs/{name}",
        "logging_steps: 5",
        "save_steps: 200",
        "plot_loss: true",
        _line("report_to", "none", "or wandb, tensorboard, swanlab, mlflow"),
        "",
        "### train",
        f"per_device_train_batch_size: {question.samples}",
        f"gradient_accumulation_steps: {question.micro_batches}",
        f"learning_rate: {goal.learning_rate}",
        "num_train_epochs: 1.0",
        "lr_scheduler_type: cosine",
        _line("warmup_steps", 0.05, "of all steps"),
        "bf16: true",
    ]
    if question.machine.device is None:
        lines.append(_line("use_cpu", True, "no accelerator was found"))
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, why: str = "") -> str:
    shown = str(value).lower() if isinstance(value, bool) else value
    text = f"{key}: {shown}"
    return f"{text:<{_COLUMN}} # {why}" if why else text


def _template(goal: Goal, template: str | None) -> list[str]:
    if goal.stage == "pt":
        return []
    if template is None:
        return [_line("template", "default", "no chat template is known for this model")]
    return [f"template: {template}"]
