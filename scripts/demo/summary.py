"""The demo's last page: what changed, how fast it was, and where everything lies."""

from __future__ import annotations

import json
import os
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from cards import Score, score

from kt_sft.checkpoint.folder import checkpoint_experts

SHOWN_ANSWERS = 3


@dataclass(frozen=True)
class Answer:
    """What one model said to one held-out question."""

    question: str
    text: str
    documented: str
    score: Score


def answers(folder: Path, examples: Sequence[dict[str, str]]) -> list[Answer]:
    """The answers that a prediction wrote, scored; `examples` are what was asked, in order."""
    lines = (folder / "generated_predictions.jsonl").read_text().splitlines()
    found = []
    for line, example in zip(lines, examples, strict=True):
        text, documented = json.loads(line)["predict"].strip(), example["output"]
        found.append(Answer(example["instruction"], text, documented, score(text, documented)))
    return found


def most_improved(before: Sequence[Answer], after: Sequence[Answer]) -> list[int]:
    """Indices of the answers that gained most, right cards first."""

    def gain(i: int) -> tuple[bool, float]:
        return after[i].score.exact, after[i].score.rouge_l - before[i].score.rouge_l

    return sorted(range(len(after)), key=gain, reverse=True)[:SHOWN_ANSWERS]


def _exact(found: Iterable[Answer]) -> int:
    return sum(answer.score.exact for answer in found)


def _rouge_l(found: Iterable[Answer]) -> float:
    return statistics.fmean(answer.score.rouge_l for answer in found)


def draw(
    history: list[dict[str, Any]], before: list[Answer], after: list[Answer], out: Path
) -> None:
    """Losses over the steps beside the held-out scores, as a PNG file."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.2), width_ratios=(2, 1), layout="constrained"
    )
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o--")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        left.plot(*zip(*points, strict=True), style, label=label)
    left.set(xlabel="step", ylabel="loss, nats a token", title="Fine-tuning")
    left.legend()
    groups = {
        "right cards": (_exact(before) / len(before), _exact(after) / len(after)),
        "ROUGE-L": (_rouge_l(before), _rouge_l(after)),
    }
    for shift, label in enumerate(("before", "after")):
        places = [group + 0.4 * shift for group in range(len(groups))]
        bars = right.bar(places, [v[shift] for v in groups.values()], 0.38, label=label)
        right.bar_label(bars, fmt="{:.0%}")
    right.set_xticks([group + 0.2 for group in range(len(groups))], list(groups))
    right.set(ylim=(0, 1.1), title=f"{len(after)} held-out questions", yticks=[])
    right.legend()
    figure.savefig(out, dpi=130)


def _wrapped(label: str, text: str) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return textwrap.fill(
        textwrap.shorten(text, 340), width=96, initial_indent=f"  {label:<11}",
        subsequent_indent=" " * 13,
    )  # fmt: skip


def summarize(
    model: Path, data: Path, outputs: Path, overrides: Sequence[str], seconds: float
) -> str:
    """The summary as text, and `demo.png` in `outputs`.

    `seconds` is the wall time of the whole demo.
    """
    adapter = outputs / "adapter"
    history = json.loads((adapter / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    steps = [entry for entry in history if "tokens_per_second" in entry]
    examples = json.loads((data / "demo_predict.json").read_text())
    before, after = (answers(outputs / f"answers_{when}", examples) for when in ("before", "after"))
    draw(history, before, after, outputs / "demo.png")
    weights = sum(layer.shape.weights for layer in checkpoint_experts(str(model)).layers)
    runs = sorted(outputs.glob("wandb/offline-run-*"))

    def median(name: str) -> float:
        return statistics.median(entry[name] for entry in steps)

    rows = {
        "Loss on held-out cards": f"{evaluations[0]:.3f} before, {evaluations[-1]:.3f} after",
        "Right cards": f"{_exact(before)} of {len(before)} before, {_exact(after)} after",
        "ROUGE-L with the documented summary": f"{_rouge_l(before):.2f} before, "
        f"{_rouge_l(after):.2f} after",
        "Training speed": f"{median('tokens_per_second'):,.0f} tokens/s",
        "Time in the CPU experts": f"{median('experts_time_share'):.0%} of training, "
        f"{1e3 * median('experts_tflops'):.0f} GFLOPS",
        "Memory of the experts": f"{weights / 1e9:.2f} GB in int8, {2 * weights / 1e9:.2f} in bf16",
        "Whole demo": f"{seconds / 60:.1f} minutes",
    }
    lines = ["", "=" * 96, "Result", ""]
    lines += [f"  {name:<40}{value}" for name, value in rows.items()]
    for i in most_improved(before, after):
        lines += ["", _wrapped("Question", after[i].question)]
        lines.append(_wrapped("Before", before[i].text))
        lines.append(_wrapped("After", after[i].text))
        lines.append(_wrapped("Documented", after[i].documented))
    command = os.path.relpath(Path(sys.executable).with_name("llamafactory-cli"))
    chat = " ".join([command, "chat recipes/demo_chat.yaml", *overrides])
    lines += [
        "",
        f"  Adapter    {adapter}/adapter_model.safetensors",
        f"  Report     {adapter}/report.html",
        f"  Plots      {outputs}/demo.png, {adapter}/training_loss.png",
        f"  Answers    {outputs}/answers_before, {outputs}/answers_after",
        f"  W&B run    {runs[-1] if runs else 'none'} (wandb sync uploads it)",
        "",
        f"  Talk to it:  {chat}",
        "               Describe `rotate(points, angle, center=(0, 0))`.",
        "",
    ]
    return "\n".join(lines)
