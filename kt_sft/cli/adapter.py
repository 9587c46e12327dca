"""`kt-sft adapter`: what is in an adapter, whether it is sound, and how two of them differ."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kt_sft.cli.help_text import sentence

_VERBS = {
    "info": "its settings, what has LoRA, in which layout, on which base, and its size",
    "check": "whether it fits its base and holds finite numbers; norms by layer",
    "diff": "how far two adapters of one base are apart, by layer",
}


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = "look into adapters: info, check, diff"
    adapter = commands.add_parser("adapter", help=text, description=sentence(text))
    verbs = adapter.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, what in _VERBS.items():
        verb = verbs.add_parser(name, help=what, description=sentence(what))
        verb.add_argument("adapter", type=Path, help="folder of an adapter")
        if name == "diff":
            verb.add_argument("other", type=Path, help="folder of another one")
        verb.add_argument("--base", metavar="MODEL", help="its base (default: what it names)")
        verb.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft adapter`. Raises KtSftError; 1 where a check finds something."""
    from kt_sft.export import inspecting

    if arguments.verb == "info":
        _print(inspecting.describe(arguments.adapter, arguments.base))
        return 0
    if arguments.verb == "diff":
        _print(inspecting.compare(arguments.adapter, arguments.other, arguments.base))
        return 0
    lines, problems = inspecting.check(arguments.adapter, arguments.base)
    _print([*lines, *(f"problem: {p}" for p in problems)])
    return 1 if problems else 0


def _print(lines: Iterable[str]) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)
