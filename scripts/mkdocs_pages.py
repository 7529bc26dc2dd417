"""Hooks of mkdocs (`mkdocs.yml`): pages of files that lie outside docs/, so that links to them work on the site too.

The pages in docs/ are read on a forge as well, where links such as `../README.md` and `../examples/serve.py` lead to
files. On the site, README.md and CONTRIBUTING.md become pages, and so does the source of each example.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".jsonl": "json", ".toml": "toml"}
# the licence and a data directory have no page; their links become plain text
WITHOUT_PAGE = re.compile(r"\[([^\]]+)\]\((?:LICENSE|optimum_arb/[^)]*)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for name, page in PAGES.items():
        text = WITHOUT_PAGE.sub(r"\1", (ROOT / name).read_text(encoding="utf-8"))
        text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
        files.append(File.generated(config, page, content=re.sub(r"\]\((examples/[^)]+)\)", r"](../\1)", text)))
    for example in sorted((ROOT / "examples").iterdir()):
        if example.name.startswith((".", "__")):
            continue
        content = f"# examples/{example.name}\n\n" + "\n".join(
            _source(file) for file in ([example] if example.is_file() else sorted(example.glob("*.*")))
        )
        files.append(File.generated(config, _page(f"examples/{example.name}"), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links out of docs/ into links to the pages made above; all pages of docs/ lie in one directory."""

    def replaced(found: re.Match[str]) -> str:
        target = found[1]
        return f"]({PAGES.get(target) or _page(target)})"

    return re.sub(r"\]\(\.\./((?:README|CONTRIBUTING)\.md|examples/[^)#]+)\)", replaced, markdown)


def _page(example: str) -> str:
    """examples/own_data.py -> examples/own_data.md, examples/quickstart.ipynb -> examples/quickstart_notebook.md"""
    path = Path(example.rstrip("/"))
    return str(path.with_name(path.stem + ("_notebook" if path.suffix == ".ipynb" else "") + ".md"))


def _source(file: Path) -> str:
    """The code of a file, or the cells of a notebook."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        parts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
        return "\n\n".join(f"```python\n{part}\n```" if is_code else part for part, is_code in parts)
    return f'```{LANGUAGES.get(file.suffix, "text")} title="{file.name}"\n{text}```\n'
