"""The plug-in hook can never break `import torch`, and does nothing where it should not."""

from __future__ import annotations

import os
import re
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


# One process that has imported what does not matter, and a child of it for each state of things.
_CHILDREN = """
import os, sys
{before}
assert not [m for m in sys.modules if m.startswith("kt_sft.") or m == "kt_sft"]
for different in {different!r}:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        exec(different)
        exec({then!r})
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def ends_of_imports(different: list[str]) -> subprocess.CompletedProcess:
    """What `import torch` does at its end; a line "2.0 True" for each state that is well."""
    return python(
        _CHILDREN.format(
            before="os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'; import torch\n"
            "assert 'kt_sft_autoload' not in sys.modules",
            different=different,
            then="torch._import_device_backends()\n"
            "print(torch.ones(2).sum().item(), 'kt_sft_autoload' in sys.modules)",
        )
    )


@pytest.fixture
def damaged(tmp_path: Path) -> dict[str, str]:
    """Folders with a package in a bad state, by what is bad."""
    for name, text in _DAMAGE.items():
        package = tmp_path / name / "kt_sft"
        package.mkdir(parents=True)
        # A missing one has an empty package and none of its modules.
        (package / "__init__.py").write_text(text or "")
    return {name: str(tmp_path / name) for name in _DAMAGE}


@pytest.mark.parametrize("disable", ["", "1"])
def test_a_damaged_package_does_not_break_torch(damaged: dict[str, str], disable: str) -> None:
    done = ends_of_imports(
        [
            f"sys.path.insert(0, {folder!r}); os.environ['KT_SFT_DISABLE'] = {disable!r}"
            for folder in damaged.values()
        ]
    )
    assert done.stdout.splitlines() == ["2.0 True"] * len(_DAMAGE), done.stderr
    # The whole import, with the package that does most harm when it is imported.
    code = "import torch; print(torch.ones(2).sum().item())"
    done = python(code, cwd=damaged["interrupts"], KT_SFT_DISABLE=disable)
    assert done.returncode == 0 and done.stdout.strip() == "2.0", done.stderr


def test_llamafactory_imports_as_ever(damaged: dict[str, str]) -> None:
    """With a damaged package, which is told, and with a whole one, whose hook fires once."""
    broken = [f"sys.path.insert(0, {damaged[name]!r})" for name in ("exits", "syntax")]
    done = python(
        _CHILDREN.format(
            # Half of what LLaMA-Factory imports; nothing of it is hooked.
            before="import torch, datasets, omegaconf\n"
            "from transformers import HfArgumentParser, Seq2SeqTrainingArguments",
            different=[*broken, ""],
            then="torch._import_device_backends()\n"  # which installs the hook again
            "from llamafactory.hparams import parser\n"
            "assert type(parser.__spec__.loader).__name__ == 'SourceFileLoader'\n"
            "stock = getattr(parser._parse_args, 'kt_sft_stock', None)\n"
            "assert not hasattr(stock, 'kt_sft_stock')\n"
            "print('fine', stock is not None)",
        )
    )
    assert done.stdout.splitlines() == ["fine False", "fine False", "fine True"], done.stderr
    assert done.stderr.count("the plug-in hook is off") == len(broken), done.stderr


def test_a_failure_inside_us_does_not_break_torch() -> None:
    """A fault planted where the hook is installed."""
    errors = ["RuntimeError('no')", "ImportError('no')", "OSError(5, 'no')"]
    done = ends_of_imports(
        [
            "class Broken(list):\n"
            f"    def insert(self, *a): raise {error}\n"
            "sys.meta_path = Broken(sys.meta_path)\n"
            for error in errors
        ]
    )
    assert done.stdout.splitlines() == ["2.0 True"] * len(errors), done.stderr
    said = re.findall("the plug-in hook is off: (.*)", done.stderr)
    assert said == ["RuntimeError('no')", "ImportError('no')", "OSError(5, 'no')"]
