"""Arguments of `kt-sft` and what each command does."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from kt_sft import __version__
from kt_sft.cli.help_text import sentence
from kt_sft.cli.recipes import run_recipe
from kt_sft.errors import KtSftError

_RECIPE_COMMANDS = {
    "train": "fine-tune, evaluate or predict with a LLaMA-Factory recipe",
    "chat": "talk to a model in the terminal",
    "api": "serve a model with an OpenAI-style API",
    "webchat": "talk to a model in the browser",
}

_VERBS = (
    *("init", "plan", "report", "profile", "export", "adapter", "pack", "errors", "bench"),
    *("doctor", "schema", "completion"),
)


def whole_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Of all commands, or of one: its module alone is imported, so that `doctor` can say what is
    wrong with an installation that does not import."""
    parser = argparse.ArgumentParser(
        prog="kt-sft",
        description="Fine-tune Mixture-of-Experts models larger than the GPU: routed experts "
        "quantized on the CPU, everything else on the accelerator.",
        epilog="With the package installed, `llamafactory-cli train recipe.yaml` understands the "
        "kt_sft section of a recipe by itself; these commands do the same where "
        "KT_SFT_DISABLE=1 switches that off.",
    )
    parser.add_argument("--version", action="version", version=f"kt-sft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    verbs = _VERBS if only is None else (only,)
    for name, text in _RECIPE_COMMANDS.items() if only is None else ():
        command = commands.add_parser(name, help=text, description=sentence(text))
        command.add_argument("recipe", help="YAML recipe with a kt_sft section")
        command.add_argument(
            "overrides",
            nargs="*",
            # Without it argparse names the overrides, too, when the recipe is missing.
            default=[],
            metavar="key=value",
            help="override settings of the recipe",
        )
        command.set_defaults(run=_run_llamafactory)
    for verb in verbs:
        import_module(f"kt_sft.cli.{verb}").add(commands)
    return parser


def _run_llamafactory(arguments: argparse.Namespace) -> int:
    return run_recipe(arguments.command, arguments.recipe, arguments.overrides)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors made on purpose are one message and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # It says at each import which of its kernels for 4 bits on the CPU it could not download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    words = sys.argv[1:] if argv is None else list(argv)
    only = words[0] if words and words[0] in _VERBS else None
    arguments = whole_parser(only).parse_args(words)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        sys.stderr.write("kt-sft: interrupted\n")
        return 130
    except (KtSftError, FileNotFoundError) as error:
        sys.stderr.write(f"kt-sft: {error}\n")
        return 2
