"""`kt-sft plan`: how a recipe's experts would be parted between host and accelerator."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from kt_sft.cli.help_text import sentence
from kt_sft.errors import SettingsError


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = "explain how the experts of a recipe's model would be parted by `schedule: auto`"
    plan = commands.add_parser("plan", help=text, description=sentence(text))
    plan.set_defaults(run=run)
    plan.add_argument("recipe", help="YAML recipe with a kt_sft section")
    plan.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings of the recipe, before any option; kt_sft.key=value for those of the section",
    )
    plan.add_argument(
        "--explain",
        action="store_true",
        help="beside the table of splits, how long each place is busy in the largest one",
    )
    plan.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="the calibration.json of another machine, from its folder of stores",
    )
    plan.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="a kt_sft_routing.json, or the folder of a run that has one (default: that of the "
        "recipe's output_dir, if it is there)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft plan`. Raises KtSftError, FileNotFoundError."""
    recipe = read_recipe(arguments.recipe, arguments.overrides)
    sys.stdout.writelines(f"{line}\n" for line in _explained(recipe, arguments))
    return 0


def read_recipe(path: str, overrides: list[str]) -> dict[str, Any]:
    """A recipe with its overrides. Raises SettingsError, FileNotFoundError."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"recipe: no file {path}")
    try:
        recipe = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: is no YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise SettingsError(f"{path}: got {type(recipe).__name__}, expected a recipe's settings")
    for override in overrides:
        _override(recipe, override)
    return recipe


def _override(recipe: dict[str, Any], override: str) -> None:
    """`key=value`, or `kt_sft.key=value` for a setting of the section."""
    from kt_sft.config import HybridExpertsSettings

    name, equals, text = override.partition("=")
    if not equals:
        raise SettingsError(f"{override}: expected key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{override}: is no YAML: {error}") from error
    first, dot, inner = name.partition(".")
    if name in {field.name for field in fields(HybridExpertsSettings)}:
        raise SettingsError(f"{name}: is a setting of the section; write kt_sft.{override}")
    if dot:
        section = recipe.setdefault(first, {})
        if not isinstance(section, dict):
            raise SettingsError(f"{name}: {first} of the recipe is no section but {section!r}")
        section[inner] = value
    else:
        recipe[name] = value


def _explained(recipe: Mapping[str, Any], arguments: argparse.Namespace) -> Iterator[str]:
    from kt_sft.checkpoint.folder import BaseModel, checkpoint_experts
    from kt_sft.checkpoint.layouts import layout_of, own_layout
    from kt_sft.config import read_section
    from kt_sft.kernels.formats import AS_PUBLISHED
    from kt_sft.planning.outline import top_k_of
    from kt_sft.planning.schedule import explain, picture, table
    from kt_sft.plugin.modes import outline_of
    from kt_sft.plugin.section import SECTION, take_section
    from kt_sft.scheduling.residents import ResidentBudget, choose_residents

    _, section = take_section(recipe)
    if section is None:
        raise SettingsError(f"{SECTION}: the recipe has no such section, or it is off")
    settings = read_section(section, Path(arguments.recipe).absolute().parent)
    folder = Path(str(recipe.get("model_name_or_path", "")))
    if not (folder / "config.json").is_file():
        raise SettingsError(
            f"model_name_or_path: got {folder}, expected the folder of a checkpoint, or one with "
            "its config.json"
        )
    model = BaseModel.of(folder)
    found = model.layers[-1]
    layout = (
        layout_of(checkpoint_experts(folder).sources[found.hybrid_path], AS_PUBLISHED)
        if settings.weights == AS_PUBLISHED
        else own_layout(found, settings.weights)
    )
    top_k = top_k_of(model.config, layout.experts)
    costs, where = _costs(settings, layout, arguments.calibration)
    shares, whose = _shares(recipe, arguments.profile, found.hybrid_path, layout.experts)
    outline = outline_of(recipe)
    most = outline.tokens if outline is not None else 4096
    budget = ResidentBudget.of(settings.gpu_experts)
    counts = sorted({0, layout.experts // 4, layout.experts // 2})
    if budget.per_layer:
        counts = [min(budget.per_layer, layout.experts)]
    elif budget.nbytes:
        each = layout.nbytes // layout.experts * len(model.layers)
        counts = [min(budget.nbytes // each, layout.experts)]
    yield (
        f"one layer of {folder.name}: {layout.experts} experts of {layout.hidden} x "
        f"{layout.intermediate} in {settings.weights}, {top_k} for each token, forward and backward"
    )
    yield f"costs: {where}; of LoRA of rank 8 in bf16, without the disk"
    if settings.schedule != "auto":
        yield f"the recipe says schedule: {settings.schedule}; this is what auto would do"
    yield f"rows: {whose}"
    yield ""
    splits = []
    for count in counts:
        name = found.hybrid_path
        resident = choose_residents({name: shares}, {name: 1}, ResidentBudget(count), {})[name]
        for tokens in sorted({1, max(1, most // 16), max(1, most // 4), most}):
            splits.append((count, explain(costs, shares, tokens, top_k, resident)))
    yield from table(splits)
    if not arguments.explain:
        return
    yield ""
    count, last = splits[-1]
    yield f"schedule: auto with {count} resident experts"
    yield from picture(last["auto"], layout)


def _shares(
    recipe: Mapping[str, Any], given: Path | None, path: str, experts: int
) -> tuple[list[float], str]:
    """The part of its layer's rows that each expert gets, and where that is from."""
    from kt_sft.scheduling.profile import FILE_NAME, RoutingProfile

    file = given or Path(str(recipe.get("output_dir", ""))) / FILE_NAME
    if file.is_dir():
        file = file / FILE_NAME
    if given is not None and not file.is_file():
        raise FileNotFoundError(f"--profile: no file {file}")
    if given is None and not file.is_file():
        return [1 / experts] * experts, "as if every expert got the same; no profile yet"
    profile, _ = RoutingProfile.load(file, {path: experts})
    shares = profile.shares()
    if path not in shares:
        raise SettingsError(f"{file}: has no rows for {path} with {experts} experts")
    return shares[path], f"by the profile {file}"


def _costs(settings: Any, layout: Any, given: Path | None) -> tuple[Any, str]:
    """Of the layer's form, and where they are from."""
    from kt_sft.engines.calibration import find_costs, measured_layer
    from kt_sft.machine.accelerator import current_accelerator

    if given is not None:
        costs, setting = find_costs(given, layout)
        return costs, f"{given}, measured on {setting['cpu']} and {setting['device']}"
    device = current_accelerator()
    if device is None:
        raise SettingsError(
            "no accelerator here to be measured; give --calibration with the calibration.json of a "
            "machine that has one (it is in its folder of stores)"
        )
    costs = measured_layer(settings, layout, device)
    return costs, f"measured here, on {device}"
