"""The optional native extension; everything else is in pyproject.toml.

A plain C object without Python or torch headers, loaded through ctypes by optimum_arb/ops/backends/cpu/native.py. Where
no compiler can build it, the installation goes on without it.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError

FOLDER = "optimum_arb/ops/backends/cpu/"


class BuildNative(build_ext):
    """Compiles with OpenMP where the compiler has it. Not linked with it: torch's own library is used at run time."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, CompileError):
            ext.extra_compile_args.remove("-fopenmp")
            super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols  # the object is no Python module: there is no PyInit function to export


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "optimum_arb.ops.backends.cpu._native",
            sources=[FOLDER + "native.c"],
            depends=[str(path) for path in Path(FOLDER).glob("*.h")],
            extra_compile_args=["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-Wno-psabi"],
            optional=True,
        )
    ],
)
