"""What the interpreter does not notice: the kernels as the compiler for sm_90 takes them, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from packaging.version import Version

BACKEND = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = [
    pytest.mark.skipif(
        not (BACKEND / "ptxas").exists() or not (BACKEND / "nvdisasm").exists(), reason="Triton without NVIDIA's tools"
    ),
    pytest.mark.skipif(Version(triton.__version__) < Version("3.5"), reason="the kernels in Gluon need Triton 3.5"),
]

needs_fused = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.6"), reason="the fused product needs Triton 3.6"
)


def compile_for_gpu(*what: str, cache: Path, script: str = "compile_for_gpu") -> str:
    """In a process of its own: this one has the interpreter."""
    here = Path(__file__)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(here.parents[3]), str(here.parents[2]), environment.get("PYTHONPATH", "")]
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    path = here.with_name(f"{script}.py")
    done = subprocess.run([sys.executable, str(path), *what], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_fused
def test_fused(tmp_path):
    """No product loses its operand's registers while it runs."""
    out = compile_for_gpu("quick", cache=tmp_path)
    assert all(
        name in out
        for name in ("_shared_kernel", "_split_kernel", "_gather_kernel", "_gather_rows_kernel", "_sum_kernel")
    )


@needs_fused
def test_self_check_of_fused(tmp_path):
    """What the first product compiles beside its own."""
    out = compile_for_gpu("check", cache=tmp_path)
    assert all(name in out for name in ("_shared_kernel", "_split_kernel", "_gather_kernel", "_sum_kernel"))


@needs_fused
def test_keys(tmp_path):
    """Calls that share a key of `Launcher` share what Triton compiles, and no number of tokens has its own."""
    assert "keys" in compile_for_gpu("keys", cache=tmp_path)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_digits(tmp_path, arch):
    """Products of 8-bit integers, of signs of which four are made at once."""
    out = compile_for_gpu("digits", arch, cache=tmp_path)
    assert "_multiply_kernel, _prepare_kernel, _sum_kernel" in out


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_few_tokens(tmp_path, arch):
    """The assembly is taken, its products run on the tensor cores, and launches overlap where there is a wait."""
    out = compile_for_gpu("one_bit", "half_bits", arch, cache=tmp_path)
    assert out.startswith("25 kernels: _decode, _multiply, _prepare, _prepare_transformed, _sum_kernel")


def test_before_hopper(tmp_path):
    """The other kernels of GPUs that have no `wgmma`; of an RTX 4090, which has less shared memory than an A100."""
    out = compile_for_gpu("portable", "digits", "dequantize", "sm_89", cache=tmp_path)
    assert "_dequantize_kernel, _gemm_kernel, _multiply_kernel" in out


@pytest.mark.parametrize("what", ["quick", pytest.param("more", marks=pytest.mark.slow)])
def test_transformed_inputs(tmp_path, what):
    """What is compiled for inputs that a Hadamard transform goes before computes that, in an emulator of the GPU."""
    out = compile_for_gpu(what, cache=tmp_path, script="prepare_transformed")
    assert "_prepare " in out
    assert "_prepare_transformed " in out


@pytest.mark.parametrize("name", ["gfx942", pytest.param("gfx1100", marks=pytest.mark.slow)])
def test_amd(tmp_path, name):
    """What is computed by default there fits the shared memory of a program."""
    assert "_dequantize_kernel, _gemm_kernel" in compile_for_gpu("portable", "dequantize", name, cache=tmp_path)


@pytest.mark.slow
def test_one_bit_every_layout(tmp_path):
    assert "_decode, _prepare" in compile_for_gpu("one_bit_layouts", cache=tmp_path)


@pytest.mark.slow
def test_every_form(tmp_path):
    assert "_gemm_kernel" in compile_for_gpu("more", "portable", cache=tmp_path)


@pytest.mark.slow
def test_dequantize_every_layout(tmp_path):
    assert "_dequantize_kernel" in compile_for_gpu("dequantize", cache=tmp_path)
