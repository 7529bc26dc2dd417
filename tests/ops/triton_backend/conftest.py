"""Triton's kernels run in its interpreter here, on tensors of the CPU; that must be said before triton is imported.

`tests/conftest.py` says so where there is no GPU. Where there is one, the tests of this directory are left out unless
TRITON_INTERPRET=1 is set for a run of their own: a process interprets all kernels or none.
"""

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
elif importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.experimental") is None:
    # no Triton, or one before 3.4, whose language lacks what the kernels use: not the others
    collect_ignore = [
        f"test_{name}.py"
        for name in (
            *("compile", "dequantize", "digits", "dispatch", "few_tokens", "gemm", "hadamard_kernel"),
            *("half_bits", "hopper_group", "native_launch"),
        )
    ]
else:
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, *scope):
        """Triton 3.6 turns arrays of one element into integers in a way that numpy 2.4 refuses: `range` of a value."""
        original(tensor, *scope)
        if scope:  # Triton 3.4 gives none
            scope[0].set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor

    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self, *args):
        """Triton 3.9 refuses masks that are no booleans, and makes integers of a comparison of scalars in a block."""
        made = splat(self, *args)
        if args[-1].data.dtype == bool:
            made.data = made.data.astype(bool)
        return made

    interpreter.InterpreterBuilder.create_splat = create_splat
