"""What the compiler made of the kernels, read from the shared object."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from kt_sft.kernels import _core

OBJECT = _core.__file__
pytestmark = pytest.mark.skipif(
    shutil.which("objdump") is None or shutil.which("nm") is None, reason="binutils are missing"
)


@pytest.fixture(scope="module")
def functions() -> dict[str, list[str]]:
    """Symbol -> its instructions."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", OBJECT], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        head, _, body = block.strip().partition("\n")
        match = re.match(r"[0-9a-f]+ <(.+)>:$", head)
        if match:
            lines = (line.split("\t", 1)[-1].strip() for line in body.splitlines())
            found.setdefault(match[1], []).extend(lines)
    return found


def test_no_shared_symbol_needs_a_newer_cpu(functions: dict[str, list[str]]) -> None:
    """A weak symbol compiled for AVX may be the copy that the linker keeps for everyone."""
    listing = subprocess.run(["nm", OBJECT], capture_output=True, text=True, check=True).stdout
    weak = {line.split()[-1] for line in listing.splitlines() if re.search(r" [WwVvu] ", line)}
    assert len(weak) > 20, "the list of weak symbols is empty: nothing was checked"
    bad = [
        name
        for name in weak & functions.keys()
        if any(re.search(r"%[yz]mm", line) for line in functions[name])
    ]
    assert not bad


# Products of the micro-kernels: at least one for each of the two accumulators of each row.
HOT = {
    # avx512_vnni and avx512_bf16 with 14 rows, avx_vnni with 6
    "vpdpbusd": 2 * sum(2 * rows for rows in range(1, 15)) + sum(2 * rows for rows in range(1, 7)),
    "vdpbf16ps": sum(2 * rows for rows in range(1, 15)),
    # avx512 with 12 rows and avx2 with 5, each for one term and for two
    "vpmaddwd": 2 * (sum(2 * rows for rows in range(1, 13)) + sum(2 * r for r in range(1, 6))),
    # avx512 and avx512_vnni with 14 rows, avx2 and avx_vnni with 6
    "vfmadd231ps": 2 * (sum(2 * rows for rows in range(1, 15)) + sum(2 * r for r in range(1, 7))),
}


@pytest.mark.parametrize("instruction", HOT)
def test_hot_loops_keep_their_accumulators_in_registers(
    functions: dict[str, list[str]], instruction: str
) -> None:
    """No vector goes through the stack between the products of a micro-kernel."""
    checked = 0
    for name, lines in functions.items():
        if "dot_" not in name and "burn_" not in name:
            continue
        at = [i for i, line in enumerate(lines) if instruction in line]
        for i in at:
            near = lines[max(0, i - 4) : i + 5]
            spills = [
                x
                for x in near
                if re.search(r"mov\w+.*(%[yz]mm.*\(%r[sb]p|\(%r[sb]p\).*%[yz]mm)", x)
            ]
            assert not spills, f"{name}: {spills}"
            checked += 1
    assert checked >= HOT[instruction], "the micro-kernels were not found"
