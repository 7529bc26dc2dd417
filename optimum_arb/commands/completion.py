"""Print a shell's completion script for these commands."""

from __future__ import annotations

import argparse

from .printing import json_text

EXAMPLES = """\
  optimum-arb completion bash > ~/.local/share/bash-completion/completions/optimum-arb
  optimum-arb completion zsh > "${fpath[1]}/_optimum-arb"

Needs the package shtab: pip install 'optimum-arb[completion]'. It completes `optimum-arb`; `optimum-cli` belongs to
optimum and has no completion."""

SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def run(args: argparse.Namespace) -> None:
    from .main import build_parser

    try:
        import shtab
    except ImportError:
        raise ImportError("Completion scripts need the package shtab: pip install 'optimum-arb[completion]'") from None
    parser = build_parser("optimum-arb")
    for subparser in all_parsers(parser):
        for action in subparser._actions:
            if action.metavar in PATHS and not action.choices:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(parser, shell=args.shell)
    print(json_text({"shell": args.shell, "script": script}) if args.json else script)


# What is completed with the names of files and directories.
PATHS = ("MODEL", "OUT", "OUT.gguf", "FILE", "NAME_OR_PATH", "DIR")


def all_parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and those of its subcommands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                found += all_parsers(subparser)
    return found
