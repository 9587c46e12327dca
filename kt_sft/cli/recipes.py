"""The commands that hand a recipe to LLaMA-Factory."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import kt_sft_autoload


def run_recipe(command: str, recipe: str, overrides: Sequence[str]) -> int:
    """Runs `llamafactory-cli <command> <recipe> <overrides>` with our hooks. FileNotFoundError."""
    if not Path(recipe).is_file():
        raise FileNotFoundError(f"recipe: no file {recipe}")
    # The hooks are installed here whatever the environment says, in torchrun's workers too.
    os.environ.pop("KT_SFT_DISABLE", None)
    kt_sft_autoload.install()
    sys.argv = ["llamafactory-cli", command, recipe, *overrides]
    from llamafactory.cli import main as llamafactory_main

    llamafactory_main()
    return 0
