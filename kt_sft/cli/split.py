"""`kt-sft plan --explain`: how experts would be parted between host and accelerator."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.errors import SettingsError

if TYPE_CHECKING:
    from kt_sft.forecast.forecast import Forecast


def explained(
    forecast: Forecast, recipe: Mapping[str, Any], arguments: argparse.Namespace
) -> Iterator[str]:
    """Lines of a table of splits, and how long each place is busy in the largest one.

    Raises SettingsError, FileNotFoundError.
    """
    from kt_sft.planning.schedule import explain, picture, table
    from kt_sft.scheduling.residents import ResidentBudget, choose_residents

    question = forecast.question
    subject, settings, outline = question.subject, question.settings, question.outline
    found, needs = subject.layers[-1], forecast.plan.layers[-1]
    layout, top_k = needs.layout, needs.top_k
    costs, where = _costs(settings, layout, arguments.calibration)
    shares, whose = _shares(recipe, arguments.profile, found.hybrid_path, layout.experts)
    most = outline.tokens if outline is not None else 4096
    budget = ResidentBudget.of(settings.gpu_experts)
    counts = sorted({0, layout.experts // 4, layout.experts // 2})
    if budget.per_layer:
        counts = [min(budget.per_layer, layout.experts)]
    elif budget.nbytes:
        each = layout.nbytes // layout.experts * len(subject.layers)
        counts = [min(budget.nbytes // each, layout.experts)]
    yield (
        f"one layer of {subject.name}: {layout.experts} experts of {layout.hidden} x "
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
