"""Build of the compiled core: one shared object that holds every instruction set.

Each file in ISA_FLAGS is compiled with its own flags; everything else for the baseline of x86-64,
so that the module loads on any such machine and chooses at run time.
"""

import platform
import shutil
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, naive_recompile
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

AVX512 = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mfma",
    "-mprefer-vector-width=512",
    # gcc 12's own headers for these intrinsics trip this warning.
    "-Wno-uninitialized",
]
VNNI, BF16 = "-mavx512vnni", "-mavx512bf16"
ISA_FLAGS = {
    "csrc/kernels/portable.cpp": [],
    "csrc/arch/x86/avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/arch/x86/avx_vnni.cpp": ["-mavx2", "-mfma", "-mavxvnni"],
    "csrc/arch/x86/avx512.cpp": AVX512,
    "csrc/arch/x86/avx512_vnni.cpp": [*AVX512, VNNI],
    "csrc/arch/x86/avx512_bf16.cpp": [*AVX512, VNNI, BF16],
    "csrc/arch/x86/amx.cpp": [*AVX512, VNNI, BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}
COMMON_FLAGS = [
    "-O3",
    "-Wall",
    "-Wextra",
    # Kernels test floats by their bits and never read errno or exception flags.
    "-fno-math-errno",
    "-fno-trapping-math",
]


# Folders at the top of the repository that users of the wheel need, too.
SHIPPED = ("recipes", "configs")
# And what `kt-sft doctor` compares versions with.
TESTED = "constraints.txt"
# Some compilers take a flag and lack the header that belongs to it.
PROBE = """
#include <immintrin.h>
void probe() { _tile_release(); }
"""


def refuse_other_machines(system: str, machine: str) -> None:
    """Raises SystemExit where the kernels cannot be built."""
    if system != "linux" or machine.lower() not in ("x86_64", "amd64"):
        raise SystemExit(
            f"kt_sft: got {system} on {machine}, expected Linux on x86-64: its kernels are written "
            "for AVX2, AVX-512 and AMX, and its memory and threads use what Linux offers. Build it "
            "on such a machine, or in a container or WSL on one"
        )


def refuse_old_compilers(compiler) -> None:
    """Raises SystemExit where the compiler is missing or does not know an instruction set."""
    flags = sorted({flag for own in ISA_FLAGS.values() for flag in own if flag.startswith("-m")})
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE)
        try:
            compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
        except CompileError as error:
            raise SystemExit(
                "kt_sft: got a compiler that cannot build for AVX-VNNI, AVX-512 and AMX "
                f"({error}), expected g++ 11 or clang++ 12, or later. Install one (Debian: apt-get "
                "install g++), or name one: CC=gcc-12 CXX=g++-12"
            ) from None


class BuildCore(build_ext):
    """Adds the flags of its instruction set to each kernel file."""

    def build_extensions(self) -> None:
        """Compiles as usual, with a compile step that knows the file."""
        refuse_other_machines(sys.platform, platform.machine())
        refuse_old_compilers(self.compiler)
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
            isa = next((f for path, f in ISA_FLAGS.items() if Path(src) == Path(path)), [])
            return compile_one(obj, src, ext, cc_args, [*extra_postargs, *isa], pp_opts)

        self.compiler._compile = compile_with_isa
        super().build_extensions()


class BuildPackage(build_py):
    """Puts recipes, settings and the tested versions into the package of a wheel."""

    def run(self) -> None:
        """Copies them after the modules; an editable install finds them where they are."""
        super().run()
        if self.editable_mode:
            return
        for folder in SHIPPED:
            target = Path(self.build_lib) / "kt_sft" / folder
            shutil.copytree(folder, target, dirs_exist_ok=True)
        shutil.copy(TESTED, Path(self.build_lib) / "kt_sft")


HEADERS = [str(p) for pattern in ("*.h", "*.inl") for p in Path("csrc").rglob(pattern)]


def needs_recompile(obj: str, src: str) -> bool:
    """Whether an object is older than its source, any header, or the flags in this file."""
    newest = max(Path(f).stat().st_mtime for f in [*HEADERS, __file__])
    return naive_recompile(obj, src) or Path(obj).stat().st_mtime < newest


SOURCES = [
    *ISA_FLAGS,
    "csrc/arch/x86/cpu.cpp",
    *sorted(map(str, Path("csrc/core").glob("*.cpp"))),
    *sorted(map(str, Path("csrc/bindings").glob("*.cpp"))),
]

if __name__ == "__main__":
    # One compiler per CPU.
    ParallelCompile(needs_recompile=needs_recompile).install()
    setup(
        ext_modules=[
            Pybind11Extension(
                "kt_sft.kernels._core",
                SOURCES,
                # Without this file here a change of flags would not get as far as needs_recompile.
                depends=[*HEADERS, "setup.py"],
                cxx_std=17,
                extra_compile_args=COMMON_FLAGS,
            )
        ],
        cmdclass={"build_ext": BuildCore, "build_py": BuildPackage},
    )
