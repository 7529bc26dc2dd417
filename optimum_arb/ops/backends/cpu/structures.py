"""What native.c is called with: its structures, field by field."""

from __future__ import annotations

import ctypes


def _fields(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class Variant(ctypes.Structure):
    _fields_ = _fields(ctypes.c_int32, "col own zone")


class Term(ctypes.Structure):
    _fields_ = (*_fields(ctypes.c_int32, "planes row variant"), ("factor", ctypes.c_float))


class Linear(ctypes.Structure):
    """`problem_t` of native.h, field by field."""

    _fields_ = (
        *_fields(
            ctypes.c_void_p,
            "x weight row_scale col_scale permutation salient_columns salient_weight salient_col_scale bias out "
            "variants terms",
        ),
        *_fields(ctypes.c_int64, "m rows columns salient row_bytes salient_bytes tiles tiles_per_block blocks"),
        *_fields(
            ctypes.c_int32,
            "x_type row_scale_type col_scale_type salient_col_scale_type bias_type permutation_bytes "
            "salient_columns_bytes planes row_scales variant_count term_count width last_bytes digits threads",
        ),
    )


class Dequantize(ctypes.Structure):
    """`dequantize_problem_t` of native.c, field by field."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "weight row_scale columns terms scales out"),
        *_fields(ctypes.c_int64, "rows row_bytes tiles tiles_per_block blocks"),
        *_fields(ctypes.c_int32, "row_scale_type row_scales term_count planes tile_bytes last_bytes threads"),
    )


class Gemm(ctypes.Structure):
    """`gemm_problem_t` of native.c, field by field."""

    _fields_ = (
        ("weight", Dequantize),
        *_fields(ctypes.c_void_p, "x permutation bias out"),
        *_fields(ctypes.c_int64, "m columns"),
        *_fields(ctypes.c_int32, "permutation_bytes bias_type"),
    )
