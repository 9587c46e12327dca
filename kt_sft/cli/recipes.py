"""The commands that hand a recipe to LLaMA-Factory."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import kt_sft_autoload
from kt_sft.cli.recipe_file import read_recipe


def run_recipe(command: str, recipe: str, overrides: Sequence[str]) -> int:
    """Runs `llamafactory-cli <command> <recipe> <overrides>` with our hooks.

    Raises SettingsError, FileNotFoundError.
    """
    read_recipe(recipe, [])  # what is no recipe ends here, in one message
    # The hooks are installed here whatever the environment says, in torchrun's workers too.
    os.environ.pop("KT_SFT_DISABLE", None)
    kt_sft_autoload.install()
    sys.argv = ["llamafactory-cli", command, recipe, *overrides]
    from llamafactory.cli import main as llamafactory_main

    llamafactory_main()
    return 0
