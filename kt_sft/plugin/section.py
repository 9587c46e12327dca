"""The `kt_sft:` section of a recipe, and how its errors are shown."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kt_sft import patches
from kt_sft.errors import KtSftError, SettingsError

SECTION = "kt_sft"


def take_section(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The recipe without the section, in a copy, and the section; None where it is off.

    Off are a recipe without it, null and false; true means every default. Raises SettingsError for
    a section under another name, which LLaMA-Factory would only call an unknown key.
    """
    for key in map(str, recipe):
        plain = re.sub(r"[^a-z]", "", key.lower())
        if key != SECTION and (plain == "ktsft" or get_close_matches(key, [SECTION], cutoff=0.8)):
            raise SettingsError(f"{key}: unknown key of the recipe; did you mean {SECTION}?")
    section = recipe.get(SECTION)
    rest = {k: v for k, v in recipe.items() if k != SECTION}
    return rest, None if section is None or section is False else section


# Programs that a person runs, and what torchrun starts for them.
_COMMANDS = ("llamafactory-cli", "lmf", "launcher.py", "cli.py", "kt-sft")


def show_errors_in_one_message() -> None:
    """Lets our errors end a command without a traceback; KT_SFT_TRACEBACK=1 shows it. Idempotent.

    In other programs an uncaught error is theirs to show.
    """
    if Path(sys.argv[0]).name in _COMMANDS:
        patches.install("errors")


def one_message(stock: Callable) -> Callable:
    """`sys.excepthook` that shows our errors as their message."""

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, KtSftError) and not os.environ.get("KT_SFT_TRACEBACK"):
            sys.stderr.write(f"{error}\n")
        else:
            stock(kind, error, trace)

    return show


def recipe_dir() -> Path | None:
    """The folder of the recipe named on the command line."""
    if len(sys.argv) > 1 and sys.argv[1].endswith((".yaml", ".yml")):
        return Path(sys.argv[1]).absolute().parent
    return None
