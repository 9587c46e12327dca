"""What every weight format costs on a checkpoint, published ones included, as a Markdown table.

    python scripts/quality_table.py .cache/demo/smollm2 .cache/demo/data/language_reference.txt

The demo makes both files. First our own formats, as `kt-sft errors MODEL --text FILE` prints them;
then copies whose routed experts the tests' writers quantize by rounding each weight to the nearest
value (GPTQ's and AWQ's own programs choose better ones). MXFP4 is published for gpt-oss alone:
its row holds that format's values in bf16, without a speed of its own.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from safetensors.torch import save_file

from kt_sft.bench.quality import (
    FormatQuality,
    measure_quality,
    table_head,
    table_line,
    windows_of,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from quantized_checkpoints import (
    QUANTIZED_FORMATS,
    dequantize_mxfp4,
    linear_stems,
    load_checkpoint,
    mxfp4_codes,
    write_fp8_block,
    write_gptq,
    write_int4_packed,
)

OWN = ("bf16", "int8", "int4_g32", "int4_g128")
# The name in the table, and what writes a copy whose codes are kept.
COPIES: dict[str, Callable[[Path, Path], None]] = {
    "fp8, blocks of 128": partial(write_fp8_block, routed_only=True),
    "int4 of compressed-tensors, g32": write_int4_packed,
    "GPTQ int4, g64": partial(write_gptq, group_size=64, routed_only=True),
}
MXFP4 = "mxfp4"


def write_mxfp4_values(source: Path, target: Path) -> None:
    """A copy in bf16 whose routed experts have MXFP4's values, which bf16 holds exactly."""
    tensors = load_checkpoint(source)
    for stem in linear_stems(tensors, routed_only=True):
        name = f"{stem}.weight"
        codes = mxfp4_codes(stem, tensors[name].float()[None])
        tensors[name] = dequantize_mxfp4(codes, stem)[0].to(tensors[name].dtype)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def rows(model: Path, text: Path, tokens: int, context: int) -> Iterator[FormatQuality]:
    """Every format, one after the other; copies are removed once they are measured."""
    windows_WT = windows_of(model, text.read_text(encoding="utf-8"), tokens, context)
    yield from measure_quality(model, windows_WT, OWN)
    copies = {**COPIES, MXFP4: write_mxfp4_values}
    for name, write in copies.items():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            write(model, copy)
            weights = "bf16" if name == MXFP4 else "checkpoint"
            (row,) = measure_quality(copy, windows_WT, [weights], against=model)
        if name == MXFP4:
            packed = QUANTIZED_FORMATS["mxfp4"].bits_per_weight / 8
            row = replace(row, bytes_per_weight=packed, tokens_per_second=None)
        yield replace(row, weights=name)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    sys.stdout.write(table_head())
    for row in rows(options.model, options.text, options.tokens, options.context):
        sys.stdout.write(table_line(row))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
