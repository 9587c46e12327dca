"""The plug-in hook can never break `import torch`, and does nothing where it should not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kt_sft_autoload import plugin_disabled


def python(code: str, cwd: str | None = None, **env: str) -> subprocess.CompletedProcess:
    """A program of its own; modules in `cwd` come first."""
    command, variables = [sys.executable, "-c", code], {**os.environ, **env}
    return subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True)


def test_import_torch_installs_the_hook_and_loads_nothing_of_ours() -> None:
    done = python(
        "import torch, sys\n"
        "print([type(f).__name__ for f in sys.meta_path if 'kt_sft' in type(f).__module__])\n"
        "print(sorted(m for m in sys.modules if m.startswith('kt_sft')))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['_Finder']", "['kt_sft_autoload']"]


@pytest.mark.parametrize(
    ("value", "off"),
    [("1", True), ("true", True), ("yes please", True)]
    + [(v, False) for v in ("", "0", "false", "No", "off")],
)
def test_what_switches_off(value: str, off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_SFT_DISABLE", value)
    assert plugin_disabled() == off


@pytest.mark.parametrize(("value", "off"), [("yes please", True), ("No", False)])
def test_switched_off(value: str, off: bool) -> None:
    """The hook and `kt-sft doctor` read the variable alike."""
    done = python(
        "import torch, sys\n"
        "print([f for f in sys.meta_path if 'kt_sft' in type(f).__module__] == [])\n"
        "from kt_sft.cli import main\n"
        "main(['doctor'])",
        KT_SFT_DISABLE=value,
    )
    assert done.stdout.startswith(f"{off}\n"), done.stderr
    assert ("off (KT_SFT_DISABLE)" in done.stdout) == off


_DAMAGE = {
    "syntax": "def (",
    "exits": "raise SystemExit(3)",
    "interrupts": "raise KeyboardInterrupt",
    "fails": "raise RuntimeError('no')",
    "base": "class Odd(BaseException): pass\nraise Odd",
    "missing": None,
}


@pytest.fixture(params=_DAMAGE)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that comes first on the path, with a package in a bad state."""
    package = tmp_path / "kt_sft"
    package.mkdir()
    if _DAMAGE[request.param] is None:
        (package / "__init__.py").write_text("")  # and none of its modules
    else:
        (package / "__init__.py").write_text(_DAMAGE[request.param])
    return str(tmp_path)


@pytest.mark.parametrize("disable", ["", "1"])
def test_a_damaged_package_does_not_break_torch(damaged: str, disable: str) -> None:
    code = "import torch; print(torch.ones(2).sum().item())"
    done = python(code, cwd=damaged, KT_SFT_DISABLE=disable)
    assert done.returncode == 0 and done.stdout.strip() == "2.0", done.stderr


@pytest.mark.parametrize("text", ["raise SystemExit(3)", "def ("])
def test_a_damaged_package_does_not_break_llamafactory(text: str, tmp_path: Path) -> None:
    (tmp_path / "kt_sft").mkdir()
    (tmp_path / "kt_sft" / "__init__.py").write_text(text)
    code = "from llamafactory.hparams import parser; print('fine')"
    done = python(code, cwd=str(tmp_path))
    assert done.stdout.strip().endswith("fine"), done.stderr
    assert "the plug-in hook is off" in done.stderr


@pytest.mark.parametrize("error", ["RuntimeError('no')", "ImportError('no')", "OSError(5, 'no')"])
def test_a_failure_inside_us_does_not_break_torch(error: str) -> None:
    """A fault planted where the hook is installed."""
    done = python(
        "import sys\n"
        "class Broken(list):\n"
        f"    def insert(self, *a): raise {error}\n"
        "sys.meta_path = Broken(sys.meta_path)\n"
        "import torch\n"
        "print(torch.ones(2).sum().item())"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2.0"
    assert "the plug-in hook is off" in done.stderr


def test_the_hook_fires_once_and_llamafactory_imports_as_ever() -> None:
    done = python(
        "import torch, importlib\n"
        "from llamafactory.hparams import parser\n"
        "assert hasattr(parser._parse_args, 'kt_sft_stock')\n"
        "stock = parser._parse_args.kt_sft_stock\n"
        "assert not hasattr(stock, 'kt_sft_stock')\n"
        "assert type(parser.__spec__.loader).__name__ == 'SourceFileLoader'\n"
        "print('fine')"
    )
    assert done.stdout.strip().endswith("fine"), done.stderr
