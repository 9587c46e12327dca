"""`kt-sft pack`: stores ahead of time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kt_sft.cli.help_text import sentence
from kt_sft.errors import SettingsError
from kt_sft.files.progress import Progress
from kt_sft.kernels import Engine, requested_isa
from kt_sft.kernels.formats import WEIGHTS
from kt_sft.machine.cpus import available_threads
from kt_sft.store.library import default_folder
from kt_sft.store.packed_file import PackedFile


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = "pack a checkpoint's experts ahead of time, or check and describe packed ones"
    pack = commands.add_parser("pack", help=text, description=sentence(text))
    pack.set_defaults(run=run)
    pack.add_argument("model", nargs="?", help="folder of a checkpoint")
    pack.add_argument("--weights", choices=WEIGHTS, default="int8", help="format (default int8)")
    pack.add_argument("--out", type=Path, help="folder of the stores (default: the user's cache)")
    pack.add_argument("--threads", type=int, help="CPU threads (default: all that are allowed)")
    pack.add_argument("--verify", type=Path, metavar="STORE", help="read a store and check it")
    pack.add_argument("--info", type=Path, metavar="STORE", help="describe a store")


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft pack`. Raises KtSftError."""
    chosen = [a for a in (arguments.model, arguments.verify, arguments.info) if a is not None]
    if len(chosen) != 1:
        raise SettingsError("pack: give the folder of a model, or --verify STORE, or --info STORE")
    threads = arguments.threads or available_threads()
    if arguments.info is not None:
        packed = PackedFile(arguments.info, verify=False)
        sys.stdout.writelines(f"{line}\n" for line in _describe(packed))
    elif arguments.verify is not None:
        packed = PackedFile(arguments.verify, verify=False)
        with Progress("Verifying", packed.nbytes) as progress:
            packed.verify(threads, progress.update)
        sys.stdout.write(f"{packed.path}: {packed.nbytes / 1e9:.3f} GB are as they were written\n")
    else:
        from kt_sft.checkpoint.folder import checkpoint_experts
        from kt_sft.loading.placing import store_of

        packed, there = store_of(
            checkpoint_experts(arguments.model),
            arguments.weights,
            arguments.out or default_folder(),
            Engine(threads, requested_isa("auto")),
        )
        what = "was there already" if there else "is packed"
        sys.stdout.write(f"{packed.path}: {packed.nbytes / 1e9:.3f} GB, {what}\n")
        if arguments.out is not None:
            sys.stdout.write(f"Use it with `store: {arguments.out}` in the kt_sft section.\n")
    return 0


def _describe(packed: PackedFile) -> Iterator[str]:
    weights = sum(layer.layout.weight_count for layer in packed.layers)
    yield f"{packed.path}: {packed.nbytes / 1e9:.3f} GB, {len(packed.layers)} layers"
    yield f"{packed.nbytes / weights:.4f} bytes a weight, {weights / 1e9:.3f} G weights"
    for file in packed.identity.get("files", []):
        yield f"from {file.get('name')}: {file.get('size')} bytes, digest {file.get('digest')}"
    for layer in packed.layers:
        layout = layer.layout
        yield (
            f"{layer.path}: {layout.experts} experts of {layout.hidden} x {layout.intermediate}, "
            f"{layout.coding or layout.weights}"
            + (f", biases of {', '.join(sorted(layout.biased))}" if layout.biased else "")
        )
