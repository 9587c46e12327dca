"""`kt-sft plan --explain`: how experts would be parted between host and accelerator."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kt_sft.errors import SettingsError


def explained(recipe: Mapping[str, Any], arguments: argparse.Namespace) -> Iterator[str]:
    """Lines of a table of splits, and how long each place is busy in the largest one.

    Raises SettingsError, CheckpointError, FileNotFoundError.
    """
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
    settings = read_section(section, arguments.folder)
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
