"""`kt-sft completion`: what a shell needs to complete commands and options."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from kt_sft.cli.help_text import sentence
from kt_sft.errors import KtSftError

_SHELLS = ("bash", "zsh", "tcsh")


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = "print completions for a shell"
    completion = commands.add_parser("completion", help=text, description=sentence(text))
    completion.add_argument("shell", choices=_SHELLS)
    completion.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft completion`. Raises KtSftError."""
    from kt_sft.cli.main import whole_parser

    try:
        import shtab
    except ImportError as error:
        raise KtSftError("completion: needs shtab: pip install 'kt_sft[completion]'") from error
    sys.stdout.write(shtab.complete(whole_parser(), arguments.shell))
    return 0
