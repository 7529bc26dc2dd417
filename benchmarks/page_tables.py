"""Tables of a page of the documentation that `fit_study.py --page` fills.

They stand between `<!-- table:begin benchmarks/fit_study.py -->` and `<!-- table:end -->`. A row is a description, the
name of a row of the study in backticks, true bits and held-out error. A note with the day, the machine and the linears
stands between `<!-- note:begin benchmarks/fit_study.py -->` and `<!-- note:end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

TABLE = re.compile(r"(<!-- table:begin benchmarks/fit_study\.py -->\n)(.*?)(<!-- table:end -->)", re.DOTALL)
NOTE = re.compile(r"(<!-- note:begin benchmarks/fit_study\.py -->\n)(.*?)(<!-- note:end -->)", re.DOTALL)
ROW = re.compile(r"^(\|[^|]*\| `([\w.-]+)` \|)[^|]*\|[^|]*\|$", re.MULTILINE)


def names(page: str) -> list[str]:
    """The rows that the tables of a page name, in order, each once."""
    return list(dict.fromkeys(row[2] for table in TABLE.finditer(page) for row in ROW.finditer(table[2])))


def filled(page: str, figures: Mapping[str, Mapping[str, Any]], note: str) -> str:
    """The page with the figures of each row (`bits_per_weight`, `held_out_error`) and the note.

    Raises:
        KeyError: a row of the page without figures.
        ValueError: a page without a note to replace.
    """

    def row(found: re.Match[str]) -> str:
        values = figures[found[2]]
        error = f"{values['held_out_error']:.4f}".removeprefix("0")
        return f"{found[1]} {values['bits_per_weight']:.3f} | {error} |"

    if not NOTE.search(page):
        raise ValueError("the page has no <!-- note:begin benchmarks/fit_study.py --> to say how it was measured.")
    page = TABLE.sub(lambda table: table[1] + ROW.sub(row, table[2]) + table[3], page)
    return NOTE.sub(lambda found: f"{found[1]}{note}\n{found[3]}", page)
