"""The entry point of the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import evaluate, inspect, push, quantize, tune

COMMANDS = (quantize, evaluate, inspect, push, tune)
# What bad input and a failing environment raise. Anything else is a defect of ours, which deserves its traceback.
EXPECTED_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def build_parser(prog: str = "optimum-arb") -> argparse.ArgumentParser:
    """The parser of all commands; the chosen command's `run(args) -> None` is in `args.run`."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Binarize language models to about one bit a weight, and measure them."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        summary = (command.__doc__ or "").splitlines()[0]
        subparser = commands.add_parser(name, help=summary, description=summary)
        command.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "optimum-arb") -> int:
    """Runs a command.

    Returns:
        The exit code: 0, or 2 after bad input, which is told in one line on stderr. Bad usage exits with 2 as well,
        through argparse; an interruption with 130.
    """
    args = build_parser(prog).parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except EXPECTED_ERRORS as error:
        if args.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{prog}: error: {message}", file=sys.stderr)
        return 2
    return 0
