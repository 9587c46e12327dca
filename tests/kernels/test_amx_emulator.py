"""The emulator against plain C, so that AMX tests on machines without AMX mean something."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from isas import EMULATED

HERE = Path(__file__).parent / "amx_emulator"


@pytest.mark.slow
@pytest.mark.skipif(not EMULATED, reason="this machine does not emulate AMX")
def test_emulator(tmp_path: Path) -> None:
    for source in HERE.iterdir():
        shutil.copy(source, tmp_path)
    library, program = tmp_path / "libamx_emulator.so", tmp_path / "test"
    subprocess.run(
        ["gcc", "-O2", "-shared", "-fPIC", tmp_path / "amx_emulator.c", "-o", library], check=True
    )
    subprocess.run(
        ["g++", "-O2", "-mamx-tile", "-mamx-int8", "-mamx-bf16", tmp_path / "test_emulator.cpp",
         "-o", program, f"-L{tmp_path}", "-lamx_emulator", f"-Wl,-rpath,{tmp_path}", "-pthread"],
        check=True,
    )  # fmt: skip
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
