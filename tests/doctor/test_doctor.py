"""`kt-sft doctor`: every finding that something is wrong is seen on what is made wrong here."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kt_sft.patches as register
from kt_sft.cli import doctor as command
from kt_sft.cli import main
from kt_sft.doctor import accelerators, host, installation, trials
from kt_sft.doctor.findings import NOTE, OK, PROBLEM, WARNING, Finding, exit_status
from kt_sft.errors import StoreFolderError
from kt_sft.machine.pages import swap_bytes, transparent_huge_pages


def one(findings: Iterator[Finding], name: str) -> Finding:
    """The finding of that name."""
    return next(f for f in findings if f.name == name)


def test_the_worst_finding_decides_the_exit_status() -> None:
    levels = {OK: 0, NOTE: 0, WARNING: 1, PROBLEM: 2}
    for level, status in levels.items():
        assert exit_status([Finding("a", "b", "c"), Finding("a", "b", "c", level)]) == status


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert status in (0, 1), "whatever else runs here"
    found = {(f["section"], f["name"]): f for f in document["findings"]}
    assert document["status"] == status
    assert found["machine", "memory bandwidth"]["data"]["read_bytes_per_second"] > 1e8
    assert found["tried", "kernels avx2"]["data"]["int8/exact"] < 1e-3
    step = next(f["data"] for (s, n), f in found.items() if n.startswith("training on"))
    assert step["hybrid"][1] < step["hybrid"][0]
    assert not any(f["hint"] for f in document["findings"] if f["level"] == OK)


def test_every_bad_finding_has_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [Finding("s", "slow", "it is slow", WARNING, "make it fast")]
    monkeypatch.setattr(command, "_examine", lambda: iter(bad))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["s", "! slow                 it is slow"]
    assert lines[2].strip() == "-> make it fast"
    assert lines[-1].startswith("kt_sft works here; see the lines with !")


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_wrong_kernels_are_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = getattr(trials, wrong)

    def off(*given: Any, **named: Any) -> Any:
        first, *rest = stock(*given, **named)
        if wrong == "forward":
            return first * 1.1, *rest
        return replace(first, hidden_TD=first.hidden_TD * 1.1), *rest

    monkeypatch.setattr(trials, wrong, off)
    found = list(trials.kernels())
    assert {f.level for f in found} == {PROBLEM}
    assert all("isa: in the section" in f.hint for f in found)


def test_a_step_that_is_not_stocks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = trials._trained

    def off(device: torch.device, *, hybrid: bool) -> tuple[float, float]:
        before, after = stock(device, hybrid=hybrid)
        return before, after + 0.01 * hybrid

    monkeypatch.setattr(trials, "_trained", off)
    assert next(trials.training_step()).level == PROBLEM


def test_a_step_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **named: Any) -> Any:
        raise ImportError("no such name")

    monkeypatch.setattr(trials, "_trained", fails)
    found = next(trials.training_step())
    assert found.level == PROBLEM and "ImportError: no such name" in found.value


def test_a_package_outside_of_a_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = installation.installed
    monkeypatch.setattr(
        installation, "installed", lambda name: "4.57.1" if name == "transformers" else real(name)
    )
    found = one(installation.packages(), "transformers")
    assert found.level == WARNING
    assert "kt_sft wants transformers >=5.6" in found.hint
    assert found.hint.endswith("pip install transformers==5.6.0")
    assert "(tested: 5.6.0)" in found.value


def test_an_untested_version_in_range_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    real = installation.installed
    monkeypatch.setattr(
        installation, "installed", lambda name: "9.9.9" if name == "safetensors" else real(name)
    )
    found = one(installation.packages(), "safetensors")
    assert (found.level, found.value, found.hint) == (NOTE, "9.9.9 (tested: 0.8.0)", "")


def test_a_package_that_is_not_there_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "installed", lambda name: None)
    found = one(installation.packages(), "wandb")
    assert (found.level, found.value) == (NOTE, "not installed")
    assert "pip install 'kt_sft[wandb]'" in found.hint


def test_a_package_that_is_needed_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "installed", lambda name: None)
    assert one(installation.packages(), "peft").level == PROBLEM


def test_a_patch_that_does_not_fit_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(register.PATCHES[0], place="transformers.trainer:Trainer.no_such_function")
    monkeypatch.setattr(register, "PATCHES", (row,))
    (found,) = installation.patches()
    assert found.level == WARNING and found.hint.startswith("install a release")


def test_the_hook_that_is_off_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_SFT_DISABLE", "1")
    found = one(installation.plugin(), "plug-in hook")
    assert (found.level, found.value) == (NOTE, "off (KT_SFT_DISABLE)")


def test_amx_that_the_system_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = host.isa_report()
    monkeypatch.setattr(host, "isa_report", lambda: [("amx", ["amx_permission"]), *real[1:]])
    found = one(host.instruction_sets(), "amx")
    assert found.level == WARNING and "seccomp" in found.hint


def test_portable_kernels_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "requested_isa", lambda setting: "portable")
    assert one(host.instruction_sets(), "in use").level == WARNING


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("always [madvise] never", "madvise"),
        ("[always] madvise never", "always"),
        ("always madvise [never]", "never"),
        (None, "unknown"),
    ],
)
def test_huge_pages(text: str | None, value: str, tmp_path: Path) -> None:
    file = tmp_path / "enabled"
    if text is not None:
        file.write_text(text)
    assert transparent_huge_pages(file) == value


def test_swap(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemFree: 1 kB\nSwapTotal:       2000 kB\nSwapFree:        500 kB\n")
    assert swap_bytes(file) == (1500 * 1024, 2000 * 1024)
    assert swap_bytes(tmp_path / "none") == (0, 0)


def test_what_slows_memory_down_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "transparent_huge_pages", lambda: "never")
    monkeypatch.setattr(host, "swap_bytes", lambda: (3_000_000_000, 4_000_000_000))
    found = {f.name: f for f in host.memory()}
    assert found["huge pages"].level == found["swap"].level == WARNING
    assert found["swap"].value == "3.0 of 4.0 GB in use"


def test_the_disk_of_the_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_SFT_STORE", str(tmp_path / "not" / "there"))
    (found,) = host.disk()
    assert found.level == OK and found.data["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == [], "nothing is left, and nothing made"

    def refuses(*given: Any, **named: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(host.tempfile, "NamedTemporaryFile", refuses)
    (found,) = host.disk()
    assert found.level == WARNING and "Read-only file system" in found.value

    def homeless() -> Path:
        raise StoreFolderError("no home")

    monkeypatch.setattr(host, "default_folder", homeless)
    (found,) = host.disk()
    assert (found.level, found.hint) == (WARNING, "no home")


def test_a_driver_without_a_device_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 24 2025\nGCC: 12\n"
    )
    assert accelerators.nvidia_driver(file) == "570.86.15"
    assert accelerators.nvidia_driver(tmp_path / "none") == ""
    monkeypatch.setattr(accelerators, "current_accelerator", lambda: None)
    assert one(accelerators.accelerators(), "device").level == NOTE
    monkeypatch.setattr(accelerators, "nvidia_driver", lambda: "570.86.15")
    found = one(accelerators.accelerators(), "device")
    assert found.level == WARNING and "570.86.15" in found.value


@pytest.mark.parametrize(("rate", "level"), [(1e9, WARNING), (2.5e10, OK)])
def test_a_device_and_its_link(rate: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(accelerators, "current_accelerator", lambda: device)
    monkeypatch.setattr(accelerators, "free_device_memory", lambda: 24_000_000_000)
    monkeypatch.setattr(accelerators, "copy_rates", lambda _: (rate, 2.5e10))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    found = {f.name: f for f in accelerators.accelerators()}
    assert "one of 2), 24.0 GB free" in found["device"].value
    assert found["link"].level == level
    assert bool(found["link"].hint) == (level == WARNING)


_CHILD = """
import sys
sys.modules[{missing!r}] = None
from kt_sft.cli import main
sys.exit(main(["doctor"]))
"""


@pytest.mark.parametrize("missing", ["kt_sft.kernels._core", "torch"])
def test_an_installation_that_does_not_import_is_diagnosed(missing: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD.format(missing=missing)], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "X kernels" in done.stdout and "do not load" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_part_that_ends_early_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Iterator[Finding]:
        yield Finding("s", "first", "there")
        raise RuntimeError("out of memory")

    found = list(command._survived(full))
    assert [f.level for f in found] == [OK, PROBLEM]
    assert found[1].value == "ended with RuntimeError: out of memory"


def test_packages_of_extras_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    real = installation.installed
    monkeypatch.setattr(
        installation, "installed", lambda name: "0.40" if name == "bitsandbytes" else real(name)
    )
    found = one(installation.packages(), "bitsandbytes")
    assert found.level == WARNING and "kt_sft wants bitsandbytes >=0.48" in found.hint
