"""The files of a report: HTML, Markdown, JSON, by their suffix."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..output_files import check_writable, whole
from .drawing import check_matplotlib
from .report_html import html_report
from .report_markdown import markdown_report

SUFFIXES = (".html", ".md", ".json")


def report_paths(names: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that were asked for: a name without a suffix is a directory, which gets one of each kind.

    Raises:
        ValueError: another suffix, or an empty name, which would be the current directory.
        OSError: as `check_writable`.
        ImportError: a page needs matplotlib, which is not installed.
    """
    paths: list[Path] = []
    for name in names:
        if not os.fspath(name):
            raise ValueError("A report has an empty name.")
        path = Path(name)
        if path.suffix and not path.is_dir():
            if path.suffix not in SUFFIXES:
                raise ValueError(f"{path}: a report is written as {', '.join(SUFFIXES)}, or into a directory.")
            paths.append(path)
        else:
            paths += [path / f"report{suffix}" for suffix in SUFFIXES]
    for path in paths:
        check_writable(path)
    if any(path.suffix == ".html" for path in paths):
        check_matplotlib()
    return paths


def write_reports(
    report: Mapping[str, Any], paths: Sequence[Path], comparison: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """Writes a report into files; each is whole or as it was.

    Args:
        report: what `evaluation.evaluate` returned.
        paths: see `report_paths`.
        comparison: see `report_html.html_report`.
    """
    for path in paths:
        if path.suffix == ".html":
            text = html_report(report, comparison)
        elif path.suffix == ".md":
            text = markdown_report(report)
        else:
            text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        with whole(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
