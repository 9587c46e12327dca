"""Many layers in one run: results as JSON, as a Markdown table and as a roofline."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kt_sft.bench.case import LayerCase
from kt_sft.bench.layer import measure_layer
from kt_sft.kernels.peak import measure_peak
from kt_sft.kernels.report import machine_description

logger = logging.getLogger(__name__)

_COLUMNS = {
    "weights": "weights",
    "compute": "compute",
    "tokens": "T",
    "forward_ms": "forward ms",
    "backward_ms": "backward ms",
    "forward_of_peak": "of peak",
    "backward_of_peak": "of peak",
    "forward_gb_s": "forward GB/s",
    "backward_gb_s": "backward GB/s",
}


def run_sweep(cases: Sequence[LayerCase], folder: Path) -> list[Path]:
    """Measures every case and writes sweep.json, sweep.md and sweep.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    peak = measure_peak(cases[0].threads, cases[0].isa)
    results = []
    for case in cases:
        results.append(measure_layer(case))
        last = results[-1]
        logger.info(
            "%s %s T=%d: %.2f / %.2f ms",
            last["weights"],
            last["compute"],
            last["tokens"],
            last["forward_ms"],
            last["backward_ms"],
        )
    document = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_description(),
        "peak": peak,
        "layers": results,
    }
    paths = [folder / f"sweep.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(document, indent=1) + "\n")
    paths[1].write_text(markdown(document))
    _draw(document, paths[2])
    return paths


def markdown(document: dict[str, Any]) -> str:
    """The table of a sweep."""
    first, peak = document["layers"][0], document["peak"]
    lines = [
        f"Measured {document['measured']} on {peak['cpu']}, {peak['threads']} threads, "
        f"{peak['isa']} kernels; D {first['hidden']}, F {first['intermediate']}, "
        f"E {first['experts']}, K {first['top_k']}, r {first['rank']}; "
        f"medians of {first['rounds']} rounds.",
        "",
        f"Peak: bf16 {peak['bf16_tflops']:.2f} TFLOPS, int8 {peak['int8_tops']:.2f} TOPS, "
        f"fp32 {peak['fp32_tflops']:.2f} TFLOPS, reading {peak['read_gb_s']:.0f} GB/s.",
        "",
        "| " + " | ".join(_COLUMNS.values()) + " |",
        "| " + " | ".join("---" for _ in _COLUMNS) + " |",
    ]
    for layer in document["layers"]:
        lines.append("| " + " | ".join(str(layer[name]) for name in _COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def _draw(document: dict[str, Any], path: Path) -> None:
    """Operations per second over operations per byte of weights, under what the machine can do."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    peak, layers = document["peak"], document["layers"]
    figure, axes = plt.subplots(figsize=(8, 5))

    intensities = [layer["flops_per_byte"] for layer in layers]
    reach = [min(intensities) / 2, max(intensities) * 2]
    slope = peak["read_gb_s"] / 1e3
    roofs = {"bf16": peak["bf16_tflops"], "exact": peak["exact_tflops"], "int8": peak["int8_tops"]}
    for index, (mode, roof) in enumerate(roofs.items()):
        if all(layer["compute"] != mode for layer in layers):
            continue
        points = sorted({*reach, roof / slope})
        axes.plot(points, [min(slope * x, roof) for x in points], color=f"C{index}", lw=1)
        for direction, marker in (("forward", "o"), ("backward", "s")):
            for weights in sorted({x["weights"] for x in layers if x["compute"] == mode}):
                own = [x for x in layers if (x["weights"], x["compute"]) == (weights, mode)]
                axes.plot(
                    [x["flops_per_byte"] for x in own],
                    [x[f"{direction}_tflops"] for x in own],
                    marker=marker,
                    ls=":",
                    color=f"C{index}",
                    alpha=0.5 if weights.startswith("int4") else 1.0,
                    label=f"{weights} {mode} {direction}",
                )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights", ylabel="TFLOPS")
    axes.set_title(f"{peak['cpu']}, {peak['threads']} threads, {peak['isa']}")
    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
