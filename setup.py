"""Build of the compiled core: one shared object that holds every instruction set.

Each file in ISA_FLAGS is compiled with its own flags; everything else for the baseline of x86-64,
so that the module loads on any such machine and chooses at run time.
"""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, naive_recompile
from setuptools import setup
from setuptools.command.build_ext import build_ext

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
    "csrc/kernels/avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/kernels/avx_vnni.cpp": ["-mavx2", "-mfma", "-mavxvnni"],
    "csrc/kernels/avx512.cpp": AVX512,
    "csrc/kernels/avx512_vnni.cpp": [*AVX512, VNNI],
    "csrc/kernels/avx512_bf16.cpp": [*AVX512, VNNI, BF16],
    "csrc/kernels/amx.cpp": [*AVX512, VNNI, BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}
COMMON_FLAGS = [
    "-O3",
    "-Wall",
    "-Wextra",
    # Kernels test floats by their bits and never read errno or exception flags.
    "-fno-math-errno",
    "-fno-trapping-math",
]


class BuildCore(build_ext):
    """Adds the flags of its instruction set to each kernel file."""

    def build_extensions(self) -> None:
        """Compiles as usual, with a compile step that knows the file."""
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
            isa = next((f for path, f in ISA_FLAGS.items() if Path(src) == Path(path)), [])
            return compile_one(obj, src, ext, cc_args, [*extra_postargs, *isa], pp_opts)

        self.compiler._compile = compile_with_isa
        super().build_extensions()


sources = [
    *ISA_FLAGS,
    *sorted(map(str, Path("csrc/core").glob("*.cpp"))),
    *sorted(map(str, Path("csrc/bindings").glob("*.cpp"))),
]
headers = [str(p) for pattern in ("*.h", "*.inl") for p in Path("csrc").rglob(pattern)]

# One compiler per CPU; files whose object is newer are skipped, unless a header changed.
newest_header = max(Path(h).stat().st_mtime for h in headers)


def needs_recompile(obj: str, src: str) -> bool:
    """Whether an object is older than its source or any header."""
    return naive_recompile(obj, src) or Path(obj).stat().st_mtime < newest_header


ParallelCompile(needs_recompile=needs_recompile).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "kt_sft.kernels._core",
            sources,
            depends=headers,
            cxx_std=17,
            extra_compile_args=COMMON_FLAGS,
        )
    ],
    cmdclass={"build_ext": BuildCore},
)
