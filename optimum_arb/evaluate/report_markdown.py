"""An evaluation as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .report_tables import Table, others, summary, tables


def markdown_table(table: Table) -> str:
    """A table; numbers to the right."""
    rule = ["---", *["---:"] * (len(table.headers) - 1)]
    lines = [table.headers, rule, *table.rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def markdown_report(report: Mapping[str, Any]) -> str:
    """The whole report.

    Args:
        report: what `evaluation.evaluate` returned.
    """
    names = ", ".join(f"`{model['label']}`" for model in others(report))
    against = next((f" against `{m['label']}`" for m in report["models"] if m["role"] == "baseline"), "")
    parts = [f"# {names}{against}"]
    if text := summary(report):
        parts.append(text)
    for table in tables(report).values():
        parts += [f"## {table.title}", markdown_table(table)]
        if table.note:
            parts.append(table.note)
    for model in others(report):
        for warning in model.get("warnings", []):
            parts.append(f"**Looks broken:** `{model['label']}`, `{warning['module']}`: {warning['message']}.")
    if any(model.get("generation") for model in report["models"]):
        parts.append("## Samples")
        for index, first in enumerate(report["models"][0]["generation"]):
            parts.append("> " + _quote(first["prompt"]))
            for model in report["models"]:
                parts.append(f"- **{_cell(model['label'])}**: {_cell(model['generation'][index]['text'])}")
    parts += ["## Reproduce", "```json", json.dumps(report["reproduce"], indent=1, ensure_ascii=False), "```"]
    return "\n\n".join(parts).replace("```json\n\n", "```json\n").replace("\n\n```", "\n```") + "\n"


def _cell(text: str) -> str:
    """What a line of a table can hold."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _quote(text: str) -> str:
    return text.replace("<", "&lt;").replace("\n", "\n> ")
