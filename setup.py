"""The optional native extensions; everything else is in pyproject.toml.

Plain C objects without Python, torch or CUDA headers, loaded through ctypes: the kernels of the CPU by
optimum_arb/ops/backends/cpu/native.py, the launches of those of the GPU by
optimum_arb/ops/backends/triton/native_launch.py. And a module of Python without torch or CUDA headers, which calls the
latter. Where no compiler can build one, the installation goes on without it.
"""

import gzip
import os
import sys
import tarfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CCompilerError, CompileError

FOLDER = "optimum_arb/ops/backends/cpu/"
LAUNCH = "optimum_arb/ops/backends/triton/"


class ReproducibleSource(sdist):
    """Two builds of the same files are the same archive, where SOURCE_DATE_EPOCH says what time it is.

    setuptools' own holds when it was built, the times of the files, and who built it.
    """

    def make_archive(
        self,
        base_name: str,
        format: str,
        root_dir: str | None = None,
        base_dir: str | None = None,
        owner: str | None = None,
        group: str | None = None,
    ) -> str:
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar" or base_dir is None:
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.mtime = int(epoch)
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        path = f"{base_name}.tar.gz"
        with (
            open(path, "wb") as file,
            gzip.GzipFile("", "wb", mtime=int(epoch), fileobj=file) as compressed,
            tarfile.open(mode="w", fileobj=compressed, format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(os.path.join(root_dir or "", base_dir), base_dir, filter=plain)  # in the order of the names
        return path


class BuildNative(build_ext):
    """Compiles with OpenMP where the compiler has it. Not linked with it: torch's own library is used at run time."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, CompileError):
            if "-fopenmp" not in ext.extra_compile_args:
                raise
            ext.extra_compile_args.remove("-fopenmp")
            super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols  # the object is no Python module: there is no PyInit function to export


setup(
    cmdclass={"build_ext": BuildNative, "sdist": ReproducibleSource},
    ext_modules=[
        Extension(
            "optimum_arb.ops.backends.cpu._native",
            sources=[FOLDER + "native.c"],
            depends=[str(path) for path in Path(FOLDER).glob("*.h")],
            # -g0: information for debuggers would hold the directory in which it was built
            extra_compile_args=[
                *("-O3", "-g0", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-Wno-psabi"),
            ],
            optional=True,
        ),
        Extension(
            "optimum_arb.ops.backends.triton._launch",
            sources=[LAUNCH + "launch.c"],
            libraries=["dl"] if sys.platform == "linux" else [],  # its own before glibc 2.34
            extra_compile_args=["-O2", "-g0", "-std=gnu11"],
            optional=True,
        ),
        Extension(
            "optimum_arb.ops.backends.triton._calls",
            sources=[LAUNCH + "calls.c"],
            extra_compile_args=["-O2", "-g0", "-std=gnu11"],
            optional=True,
        ),
    ],
)
