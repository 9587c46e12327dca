"""Resident experts of whole models: chosen, saved, and restored under the same settings only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.experts import HybridExperts, hybrid_experts_of
from kt_sft.experts.residents import place_residents, placement_of, restore_residents
from kt_sft.scheduling.residents import ResidentBudget

Modules = dict[str, HybridExperts]


@pytest.fixture(autouse=True)
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one nothing is placed."""
    monkeypatch.setattr("kt_sft.experts.residents.has_accelerator", lambda: True)


def model(**settings: Any) -> Modules:
    config = HybridExpertsConfig(threads=1, **{"schedule": "auto", **settings})
    return hybrid_experts_of(hybridize(make_model("qwen3_moe"), config))


def busy(modules: Modules, expert: int) -> None:
    """One expert gets most of the rows of every layer."""
    for module in modules.values():
        rows = [1] * 8
        rows[expert] = 50
        module.runtime.routing.record(module.path, rows)


def residents(modules: Modules) -> set[tuple[int, ...]]:
    return set(placement_of(modules).residents.values())


def saved(modules: Modules, path: Path) -> Path:
    runtime = next(iter(modules.values())).runtime
    runtime.routing.save(path, placement_of(modules))
    return path


def test_the_busiest_stay() -> None:
    modules = model(gpu_experts=2)
    assert residents(modules) == {(0, 1)}, "nothing is known yet"
    busy(modules, 5)
    assert place_residents(modules) == 3
    assert residents(modules) == {(0, 5)}
    assert place_residents(modules) == 0
    size = next(iter(modules.values())).weights.share.expert_bytes
    few = model(gpu_experts=f"{2 * size / 1000} kB")
    assert sum(map(len, placement_of(few).residents.values())) == 2


def test_without_an_accelerator_nothing_is_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_sft.experts.residents.has_accelerator", lambda: False)
    assert residents(model(gpu_experts=2)) == {()}


def test_where_the_host_computes_everything_nothing_is_placed() -> None:
    modules = model(schedule="host")
    assert place_residents(modules) == 0 and placement_of(modules).residents == {}


def test_a_checkpoint_restores_its_places(tmp_path: Path) -> None:
    modules = model(gpu_experts=2)
    busy(modules, 5)
    place_residents(modules)
    file = saved(modules, tmp_path / "routing.json")
    again = model(gpu_experts=2)
    restore_residents(again, file)
    assert residents(again) == {(0, 5)}
    shares = next(iter(again.values())).runtime.routing.shares()
    assert shares == next(iter(modules.values())).runtime.routing.shares()


@pytest.mark.parametrize(
    "settings, want",
    [
        ({"gpu_experts": 1}, {(5,)}),
        ({"gpu_experts": 0}, {()}),
        ({"gpu_experts": 3}, {(0, 1, 5)}),
        ({"gpu_experts": 2, "schedule": "resident"}, {(0, 5)}),
    ],
)
def test_other_settings_place_anew(
    tmp_path: Path, settings: dict[str, Any], want: set[tuple[int, ...]]
) -> None:
    """By the checkpoint's profile, but within what is asked for now."""
    modules = model(gpu_experts=2)
    busy(modules, 5)
    file = saved(modules, tmp_path / "routing.json")  # not placed by it yet
    again = model(**settings)
    restore_residents(again, file)
    assert residents(again) == want


@pytest.mark.parametrize("room, kept", [(1.0, True), (0.95, True), (0.5, False), (4.0, True)])
def test_a_budget_that_the_plan_decided(tmp_path: Path, room: float, kept: bool) -> None:
    """The same as before, where there is room for it: or the next places would be others."""
    modules = model(gpu_experts="auto")
    runtime = next(iter(modules.values())).runtime
    size = next(iter(modules.values())).weights.share.expert_bytes
    runtime.resident_budget = ResidentBudget(nbytes=6 * size)
    busy(modules, 5)
    place_residents(modules)
    file = saved(modules, tmp_path / "routing.json")
    again = model(gpu_experts="auto")
    other = next(iter(again.values())).runtime
    other.resident_budget = ResidentBudget(nbytes=int(room * 6 * size))
    restore_residents(again, file)
    assert (other.resident_budget.nbytes == 6 * size) == kept
    assert sum(map(len, placement_of(again).residents.values())) == (6 if kept else 3)
