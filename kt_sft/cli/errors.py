"""`kt-sft errors`: what each weight format costs on a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kt_sft.cli.help_text import sentence
from kt_sft.errors import SettingsError
from kt_sft.kernels.formats import AS_PUBLISHED, OWN_FORMATS


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = (
        "what each weight format costs on a checkpoint: the error of the weights by layer; with "
        "--text the loss on it, bytes and speed of every format and compute mode"
    )
    errors = commands.add_parser(
        "errors",
        help="measure what each weight format costs on a checkpoint",
        description=sentence(text),
    )
    errors.set_defaults(run=run)
    # What the others are compared with comes first.
    formats = sorted([*OWN_FORMATS, AS_PUBLISHED], key=lambda name: name != "bf16")
    errors.add_argument("model", type=Path, help="folder of a checkpoint")
    errors.add_argument(
        "--weights", nargs="+", choices=formats, default=formats, help="default: all"
    )
    errors.add_argument("--experts", type=int, default=2, help="experts of each layer (default 2)")
    errors.add_argument("--text", type=Path, metavar="FILE", help="text to measure the loss on")
    errors.add_argument("--tokens", type=int, default=8192, help="tokens of it (default 8192)")
    errors.add_argument("--context", type=int, default=1024, help="of a window (default 1024)")
    errors.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="the checkpoint that MODEL is a quantized copy of, to compare with (default: MODEL)",
    )
    errors.add_argument(
        "--store",
        default="memory",
        help="memory (default), or a folder where the packed experts are kept, a file a format",
    )
    errors.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON, too")


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft errors`. Raises KtSftError."""
    if arguments.experts < 1:
        raise SettingsError(f"--experts: got {arguments.experts}, expected at least 1")
    if arguments.text is None:
        _save(arguments, {"weight_errors": _by_layer(arguments)})
    else:
        _on_text(arguments)
    return 0


def _save(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    if arguments.out is None:
        return
    from kt_sft.kernels.report import machine_description

    document = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_description(),
        "model": str(arguments.model),
        **found,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


def _by_layer(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    from kt_sft.bench.quality import require_experts, weight_errors

    require_experts(arguments.model, arguments.against)
    errors = {
        weights: {
            layer: (wrong / total) ** 0.5 if total else 0.0
            for layer, (wrong, total) in weight_errors(
                arguments.model, weights, arguments.experts, arguments.against
            ).items()
        }
        for weights in arguments.weights
    }
    write = sys.stdout.write
    write("relative Frobenius error of the weights, in percent\n")
    write(f"| layer | {' | '.join(errors)} |\n|---|{'---|' * len(errors)}\n")
    for layer in dict.fromkeys(layer for by_layer in errors.values() for layer in by_layer):
        cells = (f"{100 * e[layer]:.3f}" if layer in e else "-" for e in errors.values())
        write(f"| {layer} | {' | '.join(cells)} |\n")
    return errors


def _on_text(arguments: argparse.Namespace) -> None:
    from kt_sft.bench.quality import measure_quality, table_head, table_line, windows_of

    try:
        text = arguments.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--text: {arguments.text} cannot be read as text: {error}") from error
    windows_WT = windows_of(arguments.model, text, arguments.tokens, arguments.context)
    windows, context = windows_WT.shape
    rows: list[dict[str, Any]] = []
    for row in measure_quality(
        arguments.model,
        windows_WT,
        arguments.weights,
        against=arguments.against,
        experts=arguments.experts,
        store=arguments.store,
    ):
        if not rows:
            title = f"{arguments.model} on {arguments.text}: {windows} x {context} tokens\n"
            sys.stdout.write(title + table_head())
        sys.stdout.write(table_line(row))
        sys.stdout.flush()
        rows.append(asdict(row))
        # After every row: a later one may take hours, or fail.
        _save(arguments, {"text": str(arguments.text), "rows": rows})
    if not rows:
        raise SettingsError(
            f"nothing was measured: none of --weights {' '.join(arguments.weights)} could be, for "
            "the reasons above"
        )
