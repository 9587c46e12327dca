"""Plants faults in the kernels, one at a time, and checks that the quick tests catch each.

    python scripts/mutation_check.py [--only TEXT] [--list]

Works in a copy of this tree: builds it with one fault, runs the kernel tests until the first
failure, and reports the faults that survived. About half a minute for each fault.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("csrc", "kt_sft", "tests", "setup.py", "pyproject.toml", "README.md")
QUICK_TESTS = ("tests/kernels/test_block.py", "tests/kernels/test_single_kernels.py")


@dataclass(frozen=True)
class Fault:
    """`old`, which occurs once in csrc/`file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


_ROWS = "kernels/row_kernels.inl"
_DOTS = "kernels/vector_dots.inl"
_FORWARD = "core/experts_forward.cpp"
_BACKWARD = "core/experts_backward.cpp"
_LORA = "core/lora_operands.h"

# Long lines: a fault reads best beside what it replaces.
# ruff: noqa: E501
FAULTS = (
    Fault("sign of the slope", _ROWS, "slope = s + alpha * value * (1.0f - s)",
          "slope = s - alpha * value * (1.0f - s)"),
    Fault("clamp without its zero gradient", _ROWS, "dgate[j] = kClamped && g > limit ? 0.0f : d_gate",
          "dgate[j] = d_gate"),
    Fault("offset of up left out of the gradient", _ROWS,
          "(kClamped ? clamp_both(up[j], limit) : up[j]) + offset;\n        h[j]",
          "(kClamped ? clamp_both(up[j], limit) : up[j]);\n        h[j]"),
    Fault("row sum left out", _ROWS, "const int32_t offset0 = 128 * row_sum[m * terms];",
          "const int32_t offset0 = 0 * row_sum[m * terms];"),
    Fault("row sum of the low term left out", _ROWS,
          "const int32_t offset1 = 128 * row_sum[m * terms + 1];",
          "const int32_t offset1 = 128 * row_sum[m * terms];"),
    Fault("channel scale left out", _ROWS, "if (col_scale)\n      for",
          "if (false)\n      for"),
    Fault("scale not folded into the gradient", _ROWS,
          "pack_int_row_as<true>(terms, n, x, fold, out, scale, sums);",
          "pack_int_row_as<false>(terms, n, x, fold, out, scale, sums);"),
    Fault("low term truncated", _ROWS, "const int32_t lo = q - 256 * hi;",
          "const int32_t lo = (q - 256 * hi) & ~1;"),
    Fault("int4 multiplier of the other group", _ROWS, "multiplier[g] + v * kLanes",
          "multiplier[1 - g] + v * kLanes"),
    Fault("int4 offset stale", _ROWS, "const VecU byte = 128 - 8 * m;",
          "const VecU byte = 128 - 8 * m + (m & 1);"),
    Fault("last rank dropped", _ROWS, "for (; q < rank; ++q) outer_block<1>",
          "for (; q < rank - 1; ++q) outer_block<1>"),
    Fault("routing weights ignored in the sum", _ROWS, "acc += splat(weight[k]) * load(rows[k] + j)",
          "acc += load(rows[k] + j)"),
    Fault("dropout scale left out", _ROWS, "threshold ? 0.0f : x[j] * keep", "threshold ? 0.0f : x[j]"),
    Fault("accumulate ignored", _DOTS, "if (kDrain == Drain::kWhole && accumulate) acc.read(c);", ""),
    Fault("last step dropped", _DOTS, "for (int s = 0; s < Step::kSteps; ++s) {",
          "for (int s = 0; s < Step::kSteps - (b + 1 == blocks); ++s) {"),
    Fault("second half of the outputs from the first", _DOTS, "panel + half * Step::kHalf", "panel"),
    Fault("16-bit sums emptied too late", _DOTS, "constexpr int64_t kSplitBlocks = 8;",
          "constexpr int64_t kSplitBlocks = 16;"),
    Fault("AMX: lower rows read the upper ones", "kernels/amx.cpp",
          "const char* a_lower = a + kTileRows * stride;", "const char* a_lower = a;"),
    Fault("AMX: right outputs from the left", "kernels/amx.cpp",
          "static constexpr int64_t kRight = 1024;", "static constexpr int64_t kRight = 0;"),
    Fault("transposed tile in the wrong order", "kernels/avx512_transposes.inl",
          "_mm512_shuffle_epi8(_mm512_shuffle_i32x4(low01, low23, 0xdd), order)",
          "_mm512_shuffle_epi8(_mm512_shuffle_i32x4(low01, low23, 0x88), order)"),
    Fault("widened weights not centred", "kernels/placements.inl",
          "reinterpret_cast<VecS16>(high) - 128", "reinterpret_cast<VecS16>(high) - 127"),
    Fault("gate and up swapped", _FORWARD, "activate(row, rows, col, y[0], y[1]);",
          "activate(row, rows, col, y[1], y[0]);"),
    Fault("scales of the other half", _FORWARD,
          "col_scale(item.expert, Projection::kDown, col + kPanelCols)}",
          "col_scale(item.expert, Projection::kDown, col)}"),
    Fault("bias left out", _FORWARD, "kernels_.add_row(rows, bias + col, tile);", ";"),
    Fault("down's bias left out of the routing gradient", _BACKWARD,
          "bias ? kernels_.dot_row(dp, dout_of_row(r), bias) : 0.0f", "0.0f"),
    Fault("LoRA gradient without the routing weight", _BACKWARD,
          "add_products({{Projection::kDown, q[2], true}});",
          "add_products({{Projection::kDown, q[2], false}});"),
    Fault("idle experts keep stale gradients", _BACKWARD, "if (!routing.count(e)) add_items(e);",
          "if (routing.count(e) < 0) add_items(e);"),
    Fault("LoRA B transposed", _BACKWARD, "out[n * rank + j] = sum;",
          "out[j * outputs + n] = sum;"),
    Fault("LoRA scaling left out of the gradient", _LORA,
          "bt(p, expert), op.ldb, lora.scaling,", "bt(p, expert), op.ldb, 1.0f,"),
    Fault("LoRA dropout of another projection", _LORA, "static_cast<uint64_t>(p) + 1)", "1)"),
    Fault("first row of a block skipped", "core/work_items.h",
          "std::min(units, begin + group), base + rows * part / parts,",
          "std::min(units, begin + group), base + rows * part / parts + (part > 0),"),
    Fault("skipped choices routed", "core/routing.cpp", "if (index[s] == experts) continue;",
          "if (index[s] == experts - 1) continue;"),
)  # fmt: skip


def _run(command: list[str], folder: Path, seconds: int) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(
            f"{' '.join(command)}: longer than {seconds} s; nothing is proved"
        ) from None
    return done.returncode, done.stdout + done.stderr


def _build_and_test(folder: Path) -> tuple[str, str]:
    """("passed" | "caught" | "not built", the line that tells)."""
    code, output = _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder, 600)
    if code:
        return "not built", output.strip().splitlines()[-1]
    code, output = _run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *QUICK_TESTS],
        folder,
        600,
    )
    last = [line for line in output.splitlines() if line.startswith("FAILED")]
    return ("caught" if code else "passed"), (last or output.strip().splitlines() or [""])[-1][:110]


def _plant(folder: Path, fault: Fault) -> str:
    """Returns the file's former text."""
    path = folder / "csrc" / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(
            f"{fault.name}: {fault.old!r} occurs {text.count(fault.old)} times in {fault.file}, "
            "expected once; adapt the fault to the code"
        )
    path.write_text(text.replace(fault.old, fault.new))
    return text


def main() -> int:
    """0 when every fault was caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name contains this text")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    arguments = parser.parse_args()
    faults = [f for f in FAULTS if arguments.only in f.name]
    if arguments.list:
        sys.stdout.write("\n".join(f.name for f in faults) + "\n")
        return 0
    survivors = []
    with tempfile.TemporaryDirectory(prefix="kt_sft_mutation_") as temporary:
        folder = Path(temporary)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                # Without the built core, which would pass for that of the copied sources.
                ignore = shutil.ignore_patterns("*.so", "__pycache__")
                shutil.copytree(source, folder / name, ignore=ignore)
            else:
                shutil.copy(source, folder / name)
        state, line = _build_and_test(folder)
        sys.stdout.write(f"{state:<10} without a fault: {line}\n")
        if state != "passed":
            return 1
        for fault in faults:
            start = time.perf_counter()
            path = folder / "csrc" / fault.file
            before = _plant(folder, fault)
            state, line = _build_and_test(folder)
            path.write_text(before)
            seconds = time.perf_counter() - start
            sys.stdout.write(f"{state:<10} {fault.name} ({seconds:.0f} s): {line}\n")
            sys.stdout.flush()
            if state != "caught":
                survivors.append(fault.name)
    sys.stdout.write(f"{len(faults) - len(survivors)} of {len(faults)} faults caught\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
