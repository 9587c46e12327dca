"""The compiled core by itself, under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx_vnni": ["-mavx2", "-mfma", "-mavxvnni"],
}
AVX512 = [
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx512vnni", "-mavx512bf16",
    "-mamx-tile", "-mamx-int8", "-mamx-bf16",
]  # fmt: skip


def build(folder: Path, driver: str, sanitizers: list[str]) -> Path:
    """The driver with the core; the kernels of ISA_FLAGS are sanitized like the rest."""
    sources = [HERE / f"{driver}.cpp", *sorted((CSRC / "core").glob("*.cpp"))]
    sources += sorted(
        file for room in ("kernels", "arch/x86") for file in (CSRC / room).glob("*.cpp")
    )

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        flags = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-Wno-uninitialized"]
        if source.parent.name in ("core", HERE.name) or source.stem == "cpu":
            flags += sanitizers
        elif source.stem in ISA_FLAGS:
            flags += [*sanitizers, *ISA_FLAGS[source.stem]]
        else:
            flags += AVX512
        command = ["g++", *flags, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / driver
    subprocess.run(["g++", *sanitizers, *objects, "-pthread", "-o", str(program)], check=True)
    return program


def run(program: Path, *arguments: str) -> None:
    options = "halt_on_error=1:print_stacktrace=1"
    environment = {
        **os.environ,
        "UBSAN_OPTIONS": options,
        "TSAN_OPTIONS": options,
        # The pool of a forked child is left alone on purpose; here nothing forks.
        "ASAN_OPTIONS": "halt_on_error=1:detect_leaks=1",
    }
    done = subprocess.run(
        [str(program), *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
def test_address_and_undefined_behaviour(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        "block_driver",
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    )
    run(program, "3", "portable", "avx2")


@pytest.mark.slow
def test_prefetches_name_each_line_once(tmp_path: Path) -> None:
    """A wrong address would only cost speed, so no other test sees it."""
    run(build(tmp_path, "prefetch_driver", ["-fsanitize=address,undefined"]))


@pytest.mark.slow
def test_threads(tmp_path: Path) -> None:
    run(build(tmp_path, "pool_driver", ["-fsanitize=thread"]))


@pytest.mark.slow
def test_the_sanitizers_are_awake(tmp_path: Path) -> None:
    """A planted overflow and a planted race are reported, so silence above means something."""
    overflow = tmp_path / "overflow.cpp"
    overflow.write_text(
        "#include <vector>\nint main(int n, char**) { std::vector<float> v(8); return "
        "static_cast<int>(v.data()[7 + n]); }\n"
    )
    race = tmp_path / "race.cpp"
    race.write_text(
        "#include <thread>\nint x; int main() { std::thread t([] { x++; }); x++; t.join(); }\n"
    )
    for source, sanitizer in ((overflow, "address"), (race, "thread")):
        program = tmp_path / source.stem
        subprocess.run(
            ["g++", "-g", f"-fsanitize={sanitizer}", str(source), "-pthread", "-o", str(program)],
            check=True,
        )
        done = subprocess.run([str(program)], capture_output=True, text=True)
        assert done.returncode != 0 and "Sanitizer" in done.stderr
