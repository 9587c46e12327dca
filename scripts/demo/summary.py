"""The demo's last page: what changed, how fast it was, and where everything lies."""

from __future__ import annotations

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

SHOWN_ANSWERS = 2


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _predictions(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "generated_predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _expert_bytes(model: Path) -> tuple[int, int]:
    """(int8 with scales, bf16) bytes of the routed experts, from the configuration."""
    config = _read(model / "config.json")
    hidden, middle = config["hidden_size"], config["moe_intermediate_size"]
    experts = config.get("num_experts") or config["num_local_experts"]
    layers = config["num_hidden_layers"]
    weights = 3 * hidden * middle * experts * layers
    scales = 4 * (2 * middle + hidden) * experts * layers
    return weights + scales, 2 * weights


def _question(prompt: str) -> str:
    """The user's part of a ChatML prompt."""
    text = prompt.split("<|im_start|>user")[-1] if "<|im_start|>" in prompt else prompt
    text = text.split("<|im_end|>")[0].split("assistant\n")[0]
    return text.strip().removeprefix("user").strip()


def _most_improved(before: list[dict[str, str]], after: list[dict[str, str]]) -> list[int]:
    """Questions whose answer shares most words with the reference, after fine-tuning."""

    def overlap(row: dict[str, str]) -> float:
        want, got = set(row["label"].lower().split()), set(row["predict"].lower().split())
        return len(want & got) / max(1, len(want | got))

    order = sorted(range(len(after)), key=lambda i: overlap(after[i]), reverse=True)
    return order[:SHOWN_ANSWERS]


def _wrapped(label: str, text: str) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return textwrap.fill(
        textwrap.shorten(text, 300), width=96, initial_indent=f"  {label:<11}",
        subsequent_indent=" " * 13,
    )  # fmt: skip


def summarize(cache: Path, outputs: Path, seconds: float) -> str:
    """The summary as text. `seconds` is the wall time of the whole demo."""
    adapter = outputs / "adapter"
    history = _read(adapter / "trainer_state.json")["log_history"]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    steps = [entry for entry in history if "tokens_per_second" in entry]
    stored, bf16 = _expert_bytes(cache / "model")
    before = _predictions(outputs / "answers_before")
    after = _predictions(outputs / "answers_after")
    runs = sorted(outputs.glob("wandb/offline-run-*"))

    def median(name: str) -> float:
        return statistics.median(entry[name] for entry in steps)

    lines = ["", "=" * 96, "Result", ""]
    lines.append(
        f"  Evaluation loss on held-out questions   {evaluations[0]:.3f} before, "
        f"{evaluations[-1]:.3f} after"
    )
    lines.append(
        f"  Training speed                          {median('tokens_per_second'):,.0f} tokens/s"
    )
    lines.append(
        f"  Time in the CPU experts                 {100 * median('experts_time_share'):.0f} % of "
        f"training, {1e3 * median('experts_tflops'):.0f} GFLOPS"
    )
    lines.append(
        f"  Memory of the experts                   {stored / 1e6:.1f} MB in int8, "
        f"{bf16 / 1e6:.1f} MB in bf16"
    )
    lines.append(f"  Whole demo                              {seconds / 60:.1f} minutes")
    for i in _most_improved(before, after):
        lines += ["", _wrapped("Question", _question(after[i]["prompt"]))]
        lines.append(_wrapped("Before", before[i]["predict"]))
        lines.append(_wrapped("After", after[i]["predict"]))
        lines.append(_wrapped("Documented", after[i]["label"]))
    lines += [
        "",
        f"  Adapter    {adapter}/adapter_model.safetensors",
        f"  Plots      {adapter}/training_loss.png, {adapter}/training_eval_loss.png",
        f"  Answers    {outputs}/answers_before, {outputs}/answers_after",
        f"  W&B run    {runs[-1] if runs else 'none'} (wandb sync uploads it)",
        "",
        "  Talk to it:  .venv/bin/llamafactory-cli chat recipes/demo_chat.yaml",
        "",
    ]
    return "\n".join(lines)
