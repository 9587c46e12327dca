"""`kt-sft doctor`: what this machine offers, what is installed, and what is replaced in it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import kt_sft_autoload
from kt_sft.cli.help_text import sentence
from kt_sft.config import shipped_folder

_PACKAGES = ("kt_sft", "torch", "transformers", "peft", "llamafactory", "deepspeed")


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = "show what this machine offers: instruction sets, threads, memory, versions, patches"
    doctor = commands.add_parser("doctor", help=text, description=sentence(text))
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft doctor`; 1 where a patch does not fit what is installed."""
    lines = [*_machine(), *_packages()]
    lines.append(f"{'recipes':<18}{shipped_folder() / 'recipes'}")
    off = kt_sft_autoload.plugin_disabled()
    lines.append(f"{'plug-in hook':<18}" + ("off (KT_SFT_DISABLE)" if off else "on"))
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    return _write_patches()


def _machine() -> Iterator[str]:
    from kt_sft.kernels import isa_report, kernel_rows, requested_isa
    from kt_sft.kernels.report import machine_description

    for name, value in machine_description().items():
        yield f"{name:<18}{value}"
    dots = {isa: f"{integer}, {floating}" for isa, integer, floating in kernel_rows()}
    for isa, missing in isa_report():
        usable = f"lacks {', '.join(missing)}" if missing else f"usable: {dots[isa]}"
        yield f"isa {isa:<14}{usable}"
    yield f"{'isa in use':<18}{requested_isa('auto')}"


def _packages() -> Iterator[str]:
    from importlib.metadata import PackageNotFoundError, version

    for package in _PACKAGES:
        try:
            yield f"{package:<18}{version(package)}"
        except PackageNotFoundError:
            yield f"{package:<18}not installed"


def _write_patches() -> int:
    """The register, a line for each place; 1 where one does not fit."""
    from kt_sft.patches import states

    wrong = 0
    sys.stdout.write("replaced in other programs:\n")
    for state in states():
        wrong += not state.works
        mark = " " if state.works else "!"
        sys.stdout.write(f"{mark} {state.patch.place}: {state.patch.why} ({state.text})\n")
    return min(wrong, 1)
