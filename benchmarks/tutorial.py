"""Walks docs/tutorial.md word for word, from an empty virtual environment, and times its steps.

    python benchmarks/tutorial.py --out runs/tutorial --page

The tracked and the new files of this repository are copied into the directory. There the shell blocks of the page are
run as they stand, one after the other, each with the environment that step 1 makes; a block whose first line names a
file is written to it. A block that ends with another exit code than 0 ends the walk with an error. For each step the
clock's seconds, the processor's, and the load of the machine before it (others' work counts too) are printed; `--page`
writes them into the page.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
TABLE = re.compile(r"(<!-- table:begin benchmarks/tutorial\.py -->\n).*?(<!-- table:end -->)", re.DOTALL)
ACTIVATE = "if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi\n"


class Block(NamedTuple):
    """A block of code of the page, under its section's heading."""

    step: str
    language: str
    code: str

    @property
    def file(self) -> str | None:
        """The path in the first line, a comment, of a block that is no shell's."""
        found = re.match(r"# (\S+/\S+)\n", self.code) if self.language != "sh" else None
        return found[1] if found else None


def blocks(page: str) -> Iterator[Block]:
    """The blocks of the numbered sections that are run or written, in order."""
    for step, section in re.findall(r"^## (\d+\. [^\n]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL):
        for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            block = Block(step, language, code)
            if language == "sh" or block.file:
                yield block


def copy_repository(out: Path) -> None:
    """Tracked files, and new ones that git does not ignore, as a fresh checkout would have them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    archive = subprocess.Popen(
        ["tar", "--create", "--null", "--files-from=-", "--ignore-failed-read"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert archive.stdin is not None
    archive.stdin.write(listed.stdout)
    archive.stdin.close()
    subprocess.run(["tar", "--extract", "--directory", str(out)], stdin=archive.stdout, check=True)


def table(seconds: dict[str, list[float]]) -> str:
    """The note and the table. Step -> the clock's seconds, the processors', and the load before it."""
    lines = [
        f"Walked by `benchmarks/tutorial.py` on {time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores (load: what",
        "waited for them before a step, others' programs included):",
        "",
        "| step | seconds | of the processors | load |",
        "|---|---|---|---|",
    ]
    for step, (clock, processors, load) in seconds.items():
        lines.append(f"| {step} | {clock:.0f} | {processors:.0f} | {load:.1f} |")
    clock, processors = (sum(spent[index] for spent in seconds.values()) for index in (0, 1))
    return "\n".join([*lines, f"| all | {clock:.0f} | {processors:.0f} | |", ""])


def written(page: str, text: str) -> str:
    """The page with another text between the marks of its table.

    Raises:
        ValueError: it has no marks.
    """
    found, count = TABLE.subn(lambda marks: marks[1] + text + marks[2], page)
    if count != 1:
        raise ValueError("the page has no <!-- table:begin benchmarks/tutorial.py --> to write the seconds into.")
    return found


def processor_seconds() -> float:
    """Of all programs that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Walk docs/tutorial.md word for word and time its steps.")
    parser.add_argument("--out", type=Path, required=True, help="an empty or new directory")
    parser.add_argument("--page", action="store_true", help="write the seconds into docs/tutorial.md")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    copy_repository(args.out)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    seconds: dict[str, list[float]] = {}
    for block in blocks(PAGE.read_text(encoding="utf-8")):
        if block.file:
            path = args.out / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code, encoding="utf-8")
            continue
        print(f"{block.step}\n{block.code}", file=sys.stderr, flush=True)
        load = os.getloadavg()[0]
        start, used = time.perf_counter(), processor_seconds()
        result = subprocess.run(
            ["bash", "-e", "-c", ACTIVATE + block.code], cwd=args.out, env=environment, stdout=sys.stderr
        )
        if result.returncode:
            sys.exit(f"{block.step}: exit code {result.returncode}")
        spent = seconds.setdefault(block.step, [0.0, 0.0, load])
        spent[0] += time.perf_counter() - start
        spent[1] += processor_seconds() - used
    print(table(seconds))
    if args.page:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), table(seconds)), encoding="utf-8")


if __name__ == "__main__":
    main()
