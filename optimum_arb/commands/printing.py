"""Tables and numbers for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns under underlined headers: numbers to the right, text to the left."""
    rows = [list(row) for row in rows]
    columns = range(len(headers))
    widths = [max(len(line[column]) for line in [headers, *rows]) for column in columns]
    numeric = [all(row[column][:1].isdigit() or row[column] in ("-", "inf") for row in rows) for column in columns]
    lines = [list(headers), ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            line[column].rjust(widths[column]) if numeric[column] else line[column].ljust(widths[column])
            for column in columns
        ).rstrip()
        for line in lines
    )


def fields(pairs: Iterable[tuple[str, str]]) -> str:
    """Lines of a name and its value, the values aligned."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs)


def size(count: int) -> str:
    """Bytes as a person reads them, in the decimal units of file managers and model pages."""
    for exponent, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**exponent:
            return f"{count / 1000**exponent:,.1f} {unit}"
    return f"{count} B"


def ratio(value: float | None) -> str:
    """An error relative to the weight's or the output's own size; a dash where it was not measured."""
    return "-" if value is None else f"{value:.4f}"


def json_text(content: Any) -> str:
    """JSON of what `--json` prints; null for infinity and NaN, of which JSON has none.

    Args:
        content: dicts, lists, tuples and plain values.
    """
    return json.dumps(_finite(content), allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content
