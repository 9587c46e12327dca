"""Build of the compiled core: one shared object that holds every instruction set.

Each file in ISA_FLAGS is compiled with its own flags; everything else for the baseline of x86-64,
so that the module loads on any such machine and chooses at run time.
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ISA_FLAGS = {
    "csrc/kernels/portable.cpp": [],
    "csrc/kernels/avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/kernels/avx512.cpp": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vnni",
        "-mavx512bf16",
        "-mfma",
        "-mprefer-vector-width=512",
        # gcc 12's own headers for these intrinsics trip this warning.
        "-Wno-uninitialized",
    ],
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
    "csrc/bindings/module.cpp",
]
headers = [str(p) for pattern in ("*.h", "*.inl") for p in Path("csrc").rglob(pattern)]

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
