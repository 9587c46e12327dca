"""The plug-in hook can never break `import torch`, and does nothing where it should not."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )


def test_import_torch_installs_the_hook_and_loads_nothing_of_ours() -> None:
    done = python(
        "import torch, sys\n"
        "print([type(f).__name__ for f in sys.meta_path if 'kt_sft' in type(f).__module__])\n"
        "print(sorted(m for m in sys.modules if m.startswith('kt_sft')))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['_Finder']", "['kt_sft', 'kt_sft.autoload']"]


def test_switched_off() -> None:
    done = python(
        "import torch, sys\nprint([f for f in sys.meta_path if 'kt_sft' in type(f).__module__])",
        KT_SFT_DISABLE="1",
    )
    assert done.stdout.strip() == "[]"


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
