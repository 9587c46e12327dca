"""Which experts stay on a device, and the profile that decides it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from kt_sft.config import HybridExpertsSettings
from kt_sft.errors import SettingsError
from kt_sft.scheduling.profile import Placement, RoutingProfile
from kt_sft.scheduling.residents import ResidentBudget, choose_residents


def test_budgets() -> None:
    assert ResidentBudget.of(0) == ResidentBudget(per_layer=0)
    assert ResidentBudget.of(12) == ResidentBudget(per_layer=12)
    assert ResidentBudget.of("6 GB") == ResidentBudget(nbytes=6_000_000_000)
    assert ResidentBudget.of("1.5GiB") == ResidentBudget(nbytes=3 << 29)
    assert ResidentBudget.of("0 GB") == ResidentBudget.of(0)
    assert ResidentBudget.of(" 6 GB ") == ResidentBudget.of("6GB")
    assert ResidentBudget.of("300 mb") == ResidentBudget(nbytes=300_000_000)
    assert ResidentBudget.of("auto") == ResidentBudget() and not ResidentBudget().decided


@pytest.mark.parametrize(
    "wrong", [-1, True, 10**30, "", "6", "GB", "six GB", "6 TBs", 1.5, None, "-2 GB"]
)
def test_wrong_budgets_are_refused(wrong: object) -> None:
    with pytest.raises(SettingsError, match=r"gpu_experts: got .*expected 0, auto, a number"):
        HybridExpertsSettings(schedule="auto", gpu_experts=wrong)  # type: ignore[arg-type]


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(SettingsError, match=r"with schedule: host.*set schedule: auto"):
        HybridExpertsSettings(gpu_experts=4)
    with pytest.raises(SettingsError, match="schedule: resident needs gpu_experts"):
        HybridExpertsSettings(schedule="resident")
    HybridExpertsSettings(schedule="resident", gpu_experts="auto")


SIZES = {"a": 10, "b": 20}
LOADS = {"a": [0.1, 0.5, 0.3, 0.1], "b": [0.0, 0.7, 0.2, 0.1]}


def test_those_with_the_most_rows_for_their_bytes() -> None:
    per_layer = choose_residents(LOADS, SIZES, ResidentBudget(per_layer=2), {})
    assert per_layer == {"a": (1, 2), "b": (1, 2)}
    # 0.05, 0.035, 0.03 and 0.01 for a byte, then what still fits.
    assert choose_residents(LOADS, SIZES, ResidentBudget(nbytes=40), {}) == {"a": (1, 2), "b": (1,)}
    assert choose_residents(LOADS, SIZES, ResidentBudget(nbytes=9), {}) == {"a": (), "b": ()}
    every = choose_residents(LOADS, SIZES, ResidentBudget(per_layer=9), {})
    assert every == {"a": (0, 1, 2, 3), "b": (0, 1, 2, 3)}
    unknown = choose_residents({"a": [0.0] * 4}, SIZES, ResidentBudget(per_layer=2), {})
    assert unknown == {"a": (0, 1)}


def test_places_are_kept_until_another_expert_gets_clearly_more() -> None:
    budget = ResidentBudget(per_layer=1)
    for load, stays in ((0.24, True), (0.26, False)):
        loads = {"a": [0.2, load, 0.1, 0.0]}
        chosen = choose_residents(loads, SIZES, budget, {"a": [0]})
        assert (chosen == {"a": (0,)}) == stays


def test_profiles_remember_the_latest_passes() -> None:
    profile = RoutingProfile()
    for _ in range(300):
        profile.record("a", [8, 0])
    for _ in range(300):
        profile.record("a", [0, 8])
    assert profile.passes == 600
    old, new = profile.shares()["a"]
    assert old + new == pytest.approx(1) and 0.9 < new < 0.99
    profile.record("b", [0, 0])
    assert "b" not in profile.shares()


def test_profiles_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profile, path = RoutingProfile(), tmp_path / "routing.json"
    profile.record("a", [3, 1])
    profile.record("b", [1, 1])
    profile.save(path, Placement({"a": (1,)}, "auto", None, 5000))
    assert [p.name for p in tmp_path.iterdir()] == ["routing.json"]
    found, placement = RoutingProfile.load(path, {"a": 2, "b": 2})
    assert (found.shares(), found.passes) == (profile.shares(), 2)
    assert placement == Placement({"a": (1,), "b": ()}, "auto", None, 5000)
    assert placement.budget == ResidentBudget(nbytes=5000)
    # Layers of another model are left out.
    with caplog.at_level(logging.WARNING):
        other, _ = RoutingProfile.load(path, {"a": 2, "b": 3, "c": 2})
    assert set(other.shares()) == {"a"} and "fits 1 of the model's 3 layers" in caplog.text
    good = json.loads(path.read_text())
    damaged = [
        "{", "[]", '{"version": 9}', "null",
        json.dumps({**good, "rows": {"a": ["x", 1]}}),
        json.dumps({**good, "placement": {"residents": {"a": [None]}}}),
        json.dumps({**good, "placement": {"nbytes": "much"}}),
        json.dumps({**good, "passes": float("inf")}),
    ]  # fmt: skip
    for text in damaged:
        path.write_text(text)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found, placement = RoutingProfile.load(path, {"a": 2})
        assert (found.shares(), placement) == (
            {},
            Placement(),
        ) and "no routing profile" in caplog.text
    for rows in ([float("nan"), 1.0], [-1.0, 2.0]):
        path.write_text(json.dumps({**good, "rows": {"a": rows}}))
        assert RoutingProfile.load(path, {"a": 2})[0].shares() == {}
    path.write_text(json.dumps({**good, "placement": {"residents": {"a": [7]}}}))
    assert RoutingProfile.load(path, {"a": 2})[1] == Placement()
