"""Progress in a log: lines now and then, and none for what is short."""

from __future__ import annotations

import logging
import sys

import pytest

from kt_sft.files.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO, "kt_sft")


def test_lines_say_rate_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with Progress("Packing experts", 30_000_000_000, clock=clock) as progress:
        for _ in range(30):
            clock.now += 1
            progress.update(1_000_000_000)
    assert caplog.messages == [
        "Packing experts: 5.0 of 30.0 GB, 1.00 GB/s, 25 s left",
        "Packing experts: 20.0 of 30.0 GB, 1.00 GB/s, 10 s left",
        "Packing experts: 30.0 of 30.0 GB, 1.00 GB/s in 30 s",
    ]


def test_what_is_short_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with Progress("Packing experts", 48, "layer", clock) as progress:
        for _ in range(48):
            clock.now += 0.1
            progress.update(1)
    assert caplog.messages == []


def test_things_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with pytest.raises(ValueError), Progress("Packing experts", 48, "layer", clock) as progress:
        clock.now += 6
        progress.update(12)
        raise ValueError
    assert caplog.messages == ["Packing experts: 12 of 48 layers, 18 s left"]


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("Merging", 2_000_000) as progress:
        progress.update(2_000_000)
    said = capsys.readouterr().err
    assert "Merging: 100%" in said and "2.00M/2.00M" in said
