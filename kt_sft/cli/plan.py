"""`kt-sft plan`: whether a recipe fits a machine, how long it takes, and what would be better."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kt_sft.cli.help_text import sentence
from kt_sft.cli.quiet import only_results
from kt_sft.cli.recipe_file import override, read_recipe
from kt_sft.errors import SettingsError

if TYPE_CHECKING:
    from kt_sft.forecast.forecast import Question
    from kt_sft.forecast.machines import Machine
    from kt_sft.forecast.subject import Subject

# What a model is planned with where no recipe is given.
PLAIN: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "cutoff_len": 2048,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "bf16": True,
    "kt_sft": {},
}
# LLaMA-Factory's own defaults.
_CUTOFF, _BATCH = 2048, 8
_NUMBERS = (
    *("cutoff_len", "lora_rank", "per_device_train_batch_size", "gradient_accumulation_steps"),
)


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = (
        "say whether a recipe fits, what it takes of memory and time, and which settings would be "
        "better; from the model's configuration alone (exit status 0: it fits, 1: it does not, 2: "
        "that cannot be told)"
    )
    plan = commands.add_parser(
        "plan",
        help="say whether a recipe fits, how long it takes, and what would be better",
        description=sentence(text),
    )
    plan.set_defaults(run=run)
    plan.add_argument("recipe", nargs="?", help="YAML recipe with a kt_sft section")
    plan.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings of the recipe, before any option; kt_sft.key=value for those of the section",
    )
    plan.add_argument(
        "--model",
        metavar="NAME",
        help="without a recipe: a folder that holds at least a config.json, or a name of the Hub; "
        "LoRA of rank 8 on everything, one sequence of 2,048 tokens",
    )
    plan.add_argument(
        "--machine",
        metavar="TEXT",
        help='another machine than this one: "2x64 cores amx, 512 GB, 24 GB gpu"; as known, '
        '"400 GB/s memory", "50 GB/s link", "300 TFLOPS"',
    )
    plan.add_argument("--json", action="store_true", help="print the forecast as JSON")
    plan.add_argument(
        "--explain",
        action="store_true",
        help="also how `schedule: auto` would part the experts between CPU and accelerator, which "
        "needs one here, or --calibration",
    )
    plan.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="for --explain: the calibration.json of another machine, from its folder of stores",
    )
    plan.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="for --explain: a kt_sft_routing.json, or the folder of a run that has one (default: "
        "that of the recipe's output_dir, if it is there)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft plan`. Raises KtSftError, FileNotFoundError."""
    from kt_sft.cli.split import explained
    from kt_sft.forecast import text
    from kt_sft.forecast.forecast import STATUS, ask
    from kt_sft.forecast.samples import samples_of

    if arguments.json and arguments.explain:
        raise SettingsError("plan: got --json and --explain, expected one of them")
    if (arguments.calibration or arguments.profile) and not arguments.explain:
        raise SettingsError("plan: --calibration and --profile are of --explain")
    recipe = _recipe(arguments)
    out = sys.stdout
    with only_results():
        forecast = ask(question_of(recipe, arguments.folder, arguments.machine))
        samples = samples_of(recipe)
        if arguments.json:
            out.write(json.dumps(text.as_dict(forecast, samples), indent=1) + "\n")
        else:
            out.writelines(f"{line}\n" for line in text.lines(forecast, samples))
        if arguments.explain:
            out.write("\n")
            out.writelines(f"{line}\n" for line in explained(forecast, recipe, arguments))
    return STATUS[forecast.verdict]


def _recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe, or the plain one for --model; notes where it lies in `arguments.folder`."""
    given, overrides = arguments.recipe, list(arguments.overrides)
    if arguments.model and given is not None and "=" in given:
        overrides, given = [given, *overrides], None
    if (given is None) == (arguments.model is None):
        got = "neither a recipe nor --model" if given is None else "a recipe and --model"
        raise SettingsError(f"plan: got {got}, expected one of them")
    arguments.folder = None if given is None else Path(given).absolute().parent
    if given is not None:
        return read_recipe(given, overrides)
    recipe = {**PLAIN, "kt_sft": {}, "model_name_or_path": arguments.model}
    for text in overrides:
        override(recipe, text)
    return recipe


def question_of(
    recipe: Mapping[str, Any], folder: Path | None, machine: str | Machine | None
) -> Question:
    """What a recipe asks of this machine (None), of one that is described or of one that is known
    from another question. Raises KtSftError."""
    import torch

    from kt_sft.config import read_section
    from kt_sft.forecast.forecast import Question, assumed_times, measured_times
    from kt_sft.forecast.machines import described, this_machine
    from kt_sft.forecast.subject import Subject
    from kt_sft.loading.host_embeddings import require_table
    from kt_sft.plugin.modes import outline_of, refuse_other_loaders, refuse_unsupported
    from kt_sft.plugin.recipe_keys import refuse_unknown
    from kt_sft.plugin.section import SECTION, take_section

    rest, section = take_section(recipe)
    if section is None:
        raise SettingsError(
            f"{SECTION}: the recipe has no such section, or it is off; `{SECTION}: {{}}` means "
            "every default"
        )
    settings = read_section(section, folder)
    _require_numbers(rest)
    refuse_unknown(rest)
    refuse_unsupported(rest, settings)
    refuse_other_loaders(SimpleNamespace(**{str(key): value for key, value in rest.items()}))
    name = recipe.get("model_name_or_path")
    if not name:
        raise SettingsError("model_name_or_path: the recipe has none")
    half = {"bf16": torch.bfloat16, "pure_bf16": torch.bfloat16, "fp16": torch.float16}
    subject = Subject.of(
        str(name),
        next((dtype for key, dtype in half.items() if recipe.get(key)), None),
        recipe.get("quantization_bit"),
        double=bool(recipe.get("double_quantization", True)),
        expert_lora=settings.expert_lora,
    )
    if settings.embeddings == "host":
        require_table(subject.model)
    there = described(machine) if isinstance(machine, str) else machine
    there = there or this_machine(settings)
    if recipe.get("use_cpu"):
        there = replace(there, device=None)
    outline = outline_of(rest, subject.model_type)
    return Question(
        subject,
        settings,
        outline,
        there,
        int(recipe.get("cutoff_len", _CUTOFF)),
        int(recipe.get("per_device_train_batch_size", _BATCH)),
        int(recipe.get("gradient_accumulation_steps", 1)) if outline is not None else 1,
        measured_times(settings) if there.measured else assumed_times(there, settings),
        there.measured,
        _fixed(rest, subject),
    )


def _require_numbers(recipe: Mapping[str, Any]) -> None:
    """Raises SettingsError that lists every number of the recipe that is none."""
    wrong = [
        f"{key}: got {recipe[key]!r}, expected a whole number from 1 on"
        for key in _NUMBERS
        if key in recipe and not (isinstance(recipe[key], int) and recipe[key] >= 1)
    ]
    if wrong:
        raise SettingsError("\n".join(wrong))


def _fixed(recipe: Mapping[str, Any], subject: Subject) -> frozenset[str]:
    """Changes that the recipe or the model rules out."""
    from kt_sft.plugin.modes import changes_embeddings

    tied = bool(subject.config.get_text_config().tie_word_embeddings)
    moved = tied or changes_embeddings(recipe)
    return frozenset({"kt_sft.embeddings"} if moved else ())
