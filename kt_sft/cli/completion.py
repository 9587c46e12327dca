"""`kt-sft completion`: what a shell needs to complete commands and options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from kt_sft.cli.help_text import sentence
from kt_sft.errors import KtSftError

_SHELLS = ("bash", "zsh", "tcsh")


def add(commands: Any, parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Adds the command to the parser of `kt-sft`. parser: makes the whole one."""
    text = "print completions for a shell, as kt-sft completion bash > ~/.bash_completion"
    completion = commands.add_parser("completion", help=text, description=sentence(text))
    completion.add_argument("shell", choices=_SHELLS)
    completion.set_defaults(run=lambda arguments: _run(arguments.shell, parser()))


def _run(shell: str, parser: argparse.ArgumentParser) -> int:
    try:
        import shtab
    except ImportError as error:
        raise KtSftError("completion: needs shtab: pip install 'kt_sft[completion]'") from error
    sys.stdout.write(shtab.complete(parser, shell))
    return 0
