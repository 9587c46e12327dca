"""`kt-sft init`: a commented recipe for a model that fits this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.cli.help_text import sentence
from kt_sft.cli.quiet import only_results
from kt_sft.errors import CheckpointError, KtSftError, SettingsError

if TYPE_CHECKING:
    from kt_sft.forecast.forecast import Question

_GOALS = ("sft", "dpo", "kto", "pt")


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = "write a commented recipe for a model, with settings that fit this machine"
    init = commands.add_parser("init", help=text, description=sentence(text))
    init.set_defaults(run=run)
    init.add_argument(
        "model", help="a folder that holds at least a config.json, or a name of the Hub"
    )
    init.add_argument("--goal", choices=_GOALS, default="sft", help="default: sft")
    init.add_argument("--machine", metavar="TEXT", help="another machine, as of `kt-sft plan`")
    init.add_argument("--length", type=int, default=2048, help="cutoff_len (default 2048)")
    init.add_argument("--rank", type=int, default=8, help="lora_rank (default 8)")
    init.add_argument(
        "--out", type=Path, metavar="FILE", help="default: the model's name and the goal, .yaml"
    )
    init.add_argument("--force", action="store_true", help="replace a file that is there")


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft init`. Raises KtSftError."""
    name = Path(arguments.model).resolve().name.lower().replace(".", "_").replace("-", "_")
    out: Path = arguments.out or Path(f"{name}_{arguments.goal}.yaml")
    if out.exists() and not arguments.force:
        raise SettingsError(f"--out: {out} is there; give another name, or --force")
    if min(arguments.length, arguments.rank) < 1:
        raise SettingsError("--length and --rank: expected at least 1")
    with only_results():
        text = recipe_for(
            arguments.model, arguments.goal, arguments.machine, arguments.length, arguments.rank,
            out.stem,
        )  # fmt: skip
    try:
        out.write_text(text)
    except OSError as error:
        raise SettingsError(f"--out: {out}: {error.strerror}") from error
    if "disk_tier: true" in text:
        sys.stderr.write(
            "init: the experts do not fit memory and come from the disk in every pass, which is "
            "slow; --machine plans for a larger machine\n"
        )
    sys.stdout.write(
        f"{out}: name your data in it, then\n  kt-sft plan {out}\n  llamafactory-cli train {out}\n"
    )
    return 0


def recipe_for(
    model: str, goal_name: str, machine: str | None, length: int, rank: int, name: str
) -> str:
    """The text of a recipe. Raises KtSftError where nothing fits."""
    from kt_sft.cli.plan import PLAIN, question_of
    from kt_sft.forecast.forecast import DOES_NOT_FIT, ask
    from kt_sft.forecast.starter import GOALS, starter
    from kt_sft.kernels.formats import AS_PUBLISHED
    from kt_sft.plugin.templates import template_of

    goal = GOALS[goal_name]
    recipe: dict[str, Any] = {
        **PLAIN, "model_name_or_path": model, "stage": goal.stage, "lora_rank": rank,
        "cutoff_len": length, "kt_sft": {},
    }  # fmt: skip
    asked = question_of(recipe, None, machine)
    if _kept_as_published(asked):
        # Codes that are there already lose nothing more.
        recipe["kt_sft"] = {"weights": AS_PUBLISHED}
        asked = question_of(recipe, None, asked.machine)
    forecast = ask(asked)
    if forecast.shortages:
        for change in forecast.changes:
            place = recipe["kt_sft"] if change.inner else recipe
            place[change.inner or change.key] = change.value
        forecast = ask(question_of(recipe, None, asked.machine))
    if forecast.verdict == DOES_NOT_FIT:
        where = "this machine" if machine is None else repr(machine)
        raise KtSftError(
            f"init: {model} does not fit {where} with any settings: {'; '.join(forecast.shortages)}"
            ". Take fewer tokens (--length), a smaller model, or another --machine"
        )
    options = "".join(
        f" {option}" for option in (
            f"--goal {goal_name}" if goal_name != "sft" else "",
            f'--machine "{machine}"' if machine else "",
            f"--length {length}" if length != 2048 else "",
            f"--rank {rank}" if rank != 8 else "",
        ) if option
    )  # fmt: skip
    template = template_of(model, forecast.question.subject.model_type)
    return starter(forecast, model, goal, template, name, f"kt-sft init {model}{options}")


def _kept_as_published(question: Question) -> bool:
    """Whether the experts are quantized in a form that can be kept."""
    if not question.subject.published:
        return False
    try:
        return question.subject.published_layout(question.subject.layers[-1]).weights != "bf16"
    except CheckpointError:
        return False
