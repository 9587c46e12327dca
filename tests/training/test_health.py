"""What a run is told while it can be mended: one warning and one alert for each thing."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_model
from transformers import TrainerControl, TrainerState, TrainingArguments

from kt_sft import HybridExpertsSettings, hybridize
from kt_sft.machine.throttling import throttled_seconds
from kt_sft.training import health, report, wandb_run
from kt_sft.training.health import RunHealth
from kt_sft.training.report import RunReport


class Recorder:
    """Stands in for W&B's run."""

    def __init__(self) -> None:
        self.alerts: list[tuple[str, str]] = []
        self.logged: dict[str, Any] = {}
        self.fails = False

    def alert(self, title: str, text: str) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.alerts.append((title, text))

    def log(self, values: dict[str, Any]) -> None:
        self.logged |= values


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    run = Recorder()
    fake = SimpleNamespace(run=run, Image=lambda image, caption: image, Html=lambda t, inject: t)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return run


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """log(**values): one training log of a hybrid model of 8 experts, top-2."""
    monkeypatch.setattr(health, "swapped_bytes", lambda: 0)
    monkeypatch.setattr(health, "throttled_seconds", lambda: 0.0)
    model = hybridize(make_model("qwen3_moe"), HybridExpertsSettings(threads=1))
    callback, control = RunHealth(), TrainerControl()
    state = TrainerState(is_world_process_zero=True)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    callback.on_train_begin(arguments, state, control, model=model)

    def log(**values: float) -> None:
        state.global_step += 1
        callback.on_log(arguments, state, control, logs={"loss": 1.0, **values})

    log.begin = lambda: callback.on_train_begin(arguments, state, control, model=model)  # type: ignore[attr-defined]
    return log


def test_routing_that_collapses(
    watched: Any, run: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 8 experts, two for each token: the busiest can have 4 times the mean."""
    caplog.set_level(logging.WARNING, "kt_sft")
    for imbalance in (3.9, 3.9, 1.2, 3.9, 3.9):
        watched(experts_load_max_over_mean=imbalance)
    assert run.alerts == [], "not for less than three logs in a row"
    for _ in range(3):
        watched(experts_load_max_over_mean=3.8)
    ((title, text),) = run.alerts
    assert title == "kt_sft: routing collapses" and text.startswith(
        "step 6: in most layers one expert"
    )
    assert len(caplog.records) == 1, "once"
    watched.begin()
    watched(experts_load_max_over_mean=3.9)
    assert len(run.alerts) == 1, "a new run counts anew"


def test_memory_in_swap(watched: Any, run: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    watched()
    monkeypatch.setattr(health, "swapped_bytes", lambda: 2_500_000_000)
    watched()
    watched()
    ((title, text),) = run.alerts
    assert title == "kt_sft: memory is in swap" and "2.5 GB" in text


def test_a_quota_that_holds_back(
    watched: Any, run: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 10.0])
    monkeypatch.setattr(health.time, "monotonic", lambda: next(clock, 10.0))
    watched.begin()
    monkeypatch.setattr(health.time, "monotonic", lambda: 20.0)
    monkeypatch.setattr(health, "throttled_seconds", lambda: 1.9)
    watched()
    assert run.alerts == []
    monkeypatch.setattr(health, "throttled_seconds", lambda: 3.0)
    watched()
    ((title, text),) = run.alerts
    assert title == "kt_sft: the CPU is held back" and "30%" in text


def test_an_alert_that_is_not_sent_ends_nothing(
    run: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    run.fails = True
    wandb_run.alert("a title", "a text")
    assert "was not sent: no network" in caplog.text


def test_without_a_run_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (None, SimpleNamespace(run=None)):
        monkeypatch.setitem(sys.modules, "wandb", module)
        wandb_run.alert("a", "b")
        wandb_run.log_page("a", "b")
        wandb_run.log_heatmap("a", [[1.0]])
        wandb_run.update_config(dict)


def test_the_image_of_the_load(run: Recorder) -> None:
    wandb_run.log_heatmap("load", [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5]])
    image = run.logged["load"]
    assert image.shape == (18, 24) and image.dtype == np.uint8
    cells = image[::6, ::6]
    assert cells[1].tolist() == [0, 255, 255, 255], "dark is much"
    assert cells[0].tolist() == [191] * 4 and cells[2].tolist() == [191, 191, 255, 255]


@pytest.mark.parametrize(
    ("proc", "stat", "seconds"),
    [
        (
            "0::/a/b",
            {"a/b": "nr_throttled 3\nthrottled_usec 1500000", "a": "throttled_usec 9"},
            1.5,
        ),
        ("4:cpu,cpuacct:/x", {"cpu,cpuacct/x": "throttled_time 2000000000"}, 2.0),
        ("0::/", {}, 0.0),
    ],
)
def test_throttling_is_read(
    proc: str, stat: dict[str, str], seconds: float, tmp_path: Path
) -> None:
    for folder, text in stat.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "cpu.stat").write_text(text)
    (tmp_path / "proc").write_text(proc + "\n")
    found = throttled_seconds(cgroup_root=tmp_path, proc_cgroup=tmp_path / "proc")
    assert found == pytest.approx(seconds)


def test_a_report_that_fails_ends_nothing(
    tmp_path: Path, run: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A tracker that is gone, a page that cannot be drawn: warnings, and the adapter is saved."""
    model = hybridize(make_model("qwen3_moe"), HybridExpertsSettings(threads=1))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(is_world_process_zero=True)

    def gone(values: dict[str, Any]) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(run, "log", gone)
    callback = RunReport()
    callback.on_train_begin(arguments, state, TrainerControl())
    callback.on_train_end(arguments, state, TrainerControl(), model=model)
    assert "report was not sent: no network" in caplog.text
    assert (tmp_path / "report.html").is_file()
    monkeypatch.setattr(report, "render", lambda runs: 1 / 0)
    callback.on_train_end(arguments, state, TrainerControl(), model=model)
    assert "there is no report of this run: ZeroDivisionError" in caplog.text


def test_a_model_without_a_configuration_is_watched(tmp_path: Path) -> None:
    inner = hybridize(make_model("qwen3_moe"), HybridExpertsSettings(threads=1))
    model = torch.nn.Sequential(inner)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    callback, state = RunHealth(), TrainerState()
    callback.on_train_begin(arguments, state, TrainerControl(), model=model)
    logs = {"loss": 1.0, "experts_load_max_over_mean": 9.0}
    callback.on_log(arguments, state, TrainerControl(), logs=logs)
