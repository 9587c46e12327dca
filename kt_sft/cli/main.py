"""Arguments of `kt-sft` and what each command does."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import kt_sft_autoload
from kt_sft import __version__
from kt_sft.cli.bench import add_bench, run_bench
from kt_sft.cli.errors import add_errors, run_errors
from kt_sft.cli.help_text import sentence
from kt_sft.cli.pack import add_pack, run_pack
from kt_sft.config import shipped_folder
from kt_sft.errors import KtSftError

_RECIPE_COMMANDS = {
    "train": "fine-tune, evaluate or predict with a LLaMA-Factory recipe",
    "chat": "talk to a model in the terminal",
    "api": "serve a model with an OpenAI-style API",
    "webchat": "talk to a model in the browser",
    "export": "merge an adapter into the original checkpoint, in full precision",
}


def _parser() -> argparse.ArgumentParser:
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
    for name, text in _RECIPE_COMMANDS.items():
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
    add_pack(commands)
    add_errors(commands)
    add_bench(commands)
    text = "show what this machine offers: instruction sets, threads, memory, versions"
    commands.add_parser("doctor", help=text, description=sentence(text))
    return parser


def _run_llamafactory(command: str, recipe: str, overrides: Sequence[str]) -> None:
    # The hooks are installed here whatever the environment says, in torchrun's workers too.
    os.environ.pop("KT_SFT_DISABLE", None)
    kt_sft_autoload.install()
    sys.argv = ["llamafactory-cli", command, recipe, *overrides]
    from llamafactory.cli import main as llamafactory_main

    llamafactory_main()


def _doctor() -> None:
    from importlib.metadata import PackageNotFoundError, version

    from kt_sft.kernels import isa_report, kernel_rows, requested_isa
    from kt_sft.kernels.report import machine_description

    lines = [f"{name:<18}{value}" for name, value in machine_description().items()]
    dots = {isa: f"{integer}, {floating}" for isa, integer, floating in kernel_rows()}
    for isa, missing in isa_report():
        usable = f"lacks {', '.join(missing)}" if missing else f"usable: {dots[isa]}"
        lines.append(f"isa {isa:<14}{usable}")
    lines.append(f"{'isa in use':<18}{requested_isa('auto')}")
    for package in ("kt_sft", "torch", "transformers", "peft", "llamafactory", "deepspeed"):
        try:
            lines.append(f"{package:<18}{version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package:<18}not installed")
    lines.append(f"{'recipes':<18}{shipped_folder() / 'recipes'}")
    off = kt_sft_autoload.plugin_disabled()
    lines.append(f"{'plug-in hook':<18}" + ("off (KT_SFT_DISABLE)" if off else "on"))
    sys.stdout.write("\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors made on purpose are one message and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments = _parser().parse_args(argv)
    try:
        recipe = getattr(arguments, "recipe", None)
        if recipe is not None and not Path(recipe).is_file():
            raise FileNotFoundError(f"recipe: no file {recipe}")
        if arguments.command in _RECIPE_COMMANDS:
            _run_llamafactory(arguments.command, arguments.recipe, arguments.overrides)
        elif arguments.command == "bench":
            run_bench(arguments)
        elif arguments.command == "pack":
            run_pack(arguments)
        elif arguments.command == "errors":
            run_errors(arguments)
        else:
            _doctor()
    except (KtSftError, FileNotFoundError) as error:
        sys.stderr.write(f"kt-sft: {error}\n")
        return 2
    return 0
