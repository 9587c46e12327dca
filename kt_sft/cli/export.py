"""`kt-sft export`: an adapter for another program, merged into its base, or by a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kt_sft.cli.help_text import sentence
from kt_sft.cli.recipes import run_recipe
from kt_sft.config import EXPORT_TARGETS
from kt_sft.errors import SettingsError

_EPILOG = """\
what will read it:
  peft-fused       stock PEFT 0.19 and later
  peft-fused-0.18  stock PEFT 0.17 and 0.18
  peft             stock PEFT 0.21 and later, per expert: Qwen3-MoE and OLMoE
  vllm, sglang     these servers
  gguf             llama.cpp's convert_lora_to_gguf.py
  merged           anything: a checkpoint
  kt_sft           this program; from an adapter of another one

  kt-sft export saves/adapter --to vllm --out saves/adapter-vllm
  kt-sft export saves/first,saves/second --to merged --out merged
"""


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = (
        "write an adapter in the form that another program reads, or merge it into the original "
        "checkpoint; with a recipe instead of an adapter, LLaMA-Factory's export"
    )
    export = commands.add_parser(
        "export",
        help=text,
        description=sentence(text),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.set_defaults(run=run)
    export.add_argument(
        "source",
        metavar="ADAPTER",
        help="folder of an adapter, of kt_sft or in another program's form (for --to merged also "
        "several, A,B, each trained on top of those before it); or a recipe",
    )
    export.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings of a recipe"
    )
    export.add_argument("--to", choices=EXPORT_TARGETS, help="what will read it")
    export.add_argument("--out", type=Path, metavar="DIR", help="a new folder")
    export.add_argument(
        "--base",
        metavar="MODEL",
        help="folder of the base checkpoint, or its name on the hub (default: what the adapter "
        "says that it was trained on)",
    )
    export.add_argument(
        "--dequantize",
        action="store_true",
        help="with --to merged and a quantized base: write its weights in bf16",
    )
    export.add_argument(
        "--force",
        action="store_true",
        help="take a base of the same shape that is not the one it was trained on",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft export`. Raises KtSftError."""
    source = Path(arguments.source)
    if arguments.to is None:
        if source.is_dir():
            raise SettingsError(
                f"--to: {source} is an adapter's folder, expected --to with one of "
                f"{', '.join(EXPORT_TARGETS)}"
            )
        given = [
            name for name in ("out", "base", "dequantize", "force") if getattr(arguments, name)
        ]
        if given:
            raise SettingsError(
                f"--{given[0]}: is for an adapter's folder and --to; for a recipe set export_dir, "
                "model_name_or_path and the kt_sft section's adapter_base"
            )
        return run_recipe("export", arguments.source, arguments.overrides)
    if source.is_file():
        raise SettingsError(
            f"--to: {source} is a file, expected an adapter's folder; for a recipe leave --to out"
        )
    if arguments.overrides:
        raise SettingsError(f"got {' '.join(arguments.overrides)}, which is for recipes only")
    if arguments.out is None:
        raise SettingsError("--out: is missing; give a new folder")
    if arguments.dequantize and arguments.to != "merged":
        raise SettingsError(f"--dequantize: is for --to merged only, got --to {arguments.to}")
    from kt_sft.export.command import export_adapter

    lines = export_adapter(
        arguments.source.split(","),
        arguments.to,
        arguments.out,
        base=arguments.base,
        dequantize=arguments.dequantize,
        force=arguments.force,
    )
    sys.stdout.write(f"wrote {arguments.out}; load it with\n")
    sys.stdout.writelines(f"  {line}\n" for line in lines)
    return 0
