"""The arguments of `kt-sft bench` and what its three commands print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from kt_sft.cli.help_text import sentence
from kt_sft.kernels.formats import OWN_FORMATS

_SHAPE = {
    "hidden": 2048,
    "intermediate": 768,
    "experts": 128,
    "top-k": 8,
    "tokens": 2048,
    "rank": 8,
    "rounds": 5,
}


def add(commands: argparse._SubParsersAction) -> None:
    """Adds `bench` with `peak`, `layer` and `sweep`."""
    bench = commands.add_parser("bench", help="measure the kernels on this machine")
    bench.set_defaults(run=run)
    what = bench.add_subparsers(dest="what", required=True, metavar="WHAT")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = what.add_parser(
            name,
            help=text,
            description=sentence(text),
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        added.add_argument(
            "--threads", type=int, default=None, help="default: what this process may use"
        )
        added.add_argument("--isa", default="auto", help="auto, or a name of `kt-sft doctor`")
        return added

    peak = command("peak", "the machine's arithmetic and memory rates")
    peak.add_argument("--json", action="store_true", help="print one JSON object")

    layer = command("layer", "one layer of experts, forward and backward (Qwen3-30B-A3B's)")
    for name, default in _SHAPE.items():
        layer.add_argument(f"--{name}", type=int, default=default)
    layer.add_argument("--weights", choices=OWN_FORMATS, default="int8")
    layer.add_argument("--compute", choices=("exact", "int8"), default="exact")
    layer.add_argument("--skew", type=float, default=0.0, help="share of rows for one expert")
    layer.add_argument(
        "--vs",
        choices=("torch", "transformers", "kt-kernel"),
        default=None,
        help="a peer, interleaved in the same run",
    )
    layer.add_argument(
        "--peer-env",
        type=Path,
        default=None,
        help="virtual environment that has kt-kernel; default: made in the user's cache",
    )
    layer.add_argument("--json", action="store_true", help="print one JSON object")

    sweep = command("sweep", "layers of many sizes in every format, as JSON, table and roofline")
    for name, default in _SHAPE.items():
        if name != "tokens":
            sweep.add_argument(f"--{name}", type=int, default=default)
    sweep.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 2048], help="batch sizes"
    )
    sweep.add_argument("--weights", choices=OWN_FORMATS, nargs="+", default=[*OWN_FORMATS])
    sweep.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder")


def _layer_case(arguments: argparse.Namespace, **changes: Any) -> Any:
    from kt_sft.bench.case import LayerCase
    from kt_sft.bench.layer import default_threads

    known = {f.name for f in fields(LayerCase)}
    values = {name: value for name, value in vars(arguments).items() if name in known}
    values["threads"] = arguments.threads or default_threads()
    return LayerCase(**{**values, **changes})


def _print(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    width = max(map(len, result))
    for name, value in result.items():
        sys.stdout.write(f"{name:<{width}}  {value}\n")


def run(arguments: argparse.Namespace) -> int:
    """Runs one of the three commands."""
    if arguments.what == "peak":
        from kt_sft.bench.layer import default_threads
        from kt_sft.kernels.peak import measure_peak

        threads = arguments.threads or default_threads()
        _print(measure_peak(threads, arguments.isa), arguments.json)
    elif arguments.what == "layer":
        from kt_sft.bench.layer import measure_layer

        result = measure_layer(_layer_case(arguments), arguments.vs, arguments.peer_env)
        _print(result, arguments.json)
    else:
        from kt_sft.bench.sweep import run_sweep

        cases = [
            _layer_case(arguments, tokens=tokens, weights=weights, compute=compute)
            for weights in arguments.weights
            for compute in (("exact",) if weights == "bf16" else ("exact", "int8"))
            for tokens in arguments.tokens
        ]
        for path in run_sweep(cases, arguments.out):
            sys.stdout.write(f"{path}\n")
    return 0
