"""The entry point of the command line."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence

from . import compare, completion, estimate, evaluate, export, inspect, push, quantize, requantize, tune, verify

COMMANDS = (
    quantize, requantize, evaluate, verify, inspect, compare, estimate, export, push, tune, completion,
)  # fmt: skip
EXIT_CODES = """\
exit codes:
  0    done
  1    done, and a check that was asked for failed (a bound on the perplexity, a limit of memory, a row of a table)
  2    bad usage or input, or an environment that fails: one line on stderr says what
  130  interrupted; what quantize has finished is kept, and it says how to go on
  141  what reads stdout, such as head, has closed it"""
# What bad input and a failing environment raise. Anything else is a defect of ours, which deserves its traceback.
EXPECTED_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)


def build_parser(prog: str = "optimum-arb") -> argparse.ArgumentParser:
    """The parser of all commands; the chosen command's `run(args) -> int | None`, its exit code, is in `args.run`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Binarize language models to about one bit a weight, and measure them.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        summary = (command.__doc__ or "").splitlines()[0]
        subparser = commands.add_parser(
            name,
            help=summary,
            description=(command.__doc__ or "").strip(),
            epilog=f"examples:\n{command.EXAMPLES}\n\n{EXIT_CODES}".replace("%", "%%").replace("%%(prog)s", "%(prog)s"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "optimum-arb") -> int:
    """Runs a command.

    Returns:
        The exit code, see `EXIT_CODES`. Bad usage exits with 2 through argparse.
    """
    args = build_parser(prog).parse_args(argv)
    try:
        code = args.run(args) or 0
        sys.stdout.flush()  # what cannot be written is told here, and not when Python ends
        return code
    except KeyboardInterrupt as error:
        if args.debug:
            raise
        print(f"{prog}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except EXPECTED_ERRORS as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            return 141
        if args.debug:
            raise
        unnamed = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
        message = " ".join(str(error).split()) or unnamed
        print(f"{prog}: error: {message}", file=sys.stderr)
        return 2


def _stdout_is_closed() -> bool:
    """Whether nobody reads stdout any more; then nothing is written there when Python ends."""
    poll = select.poll()  # POSIX has it, and elsewhere no BrokenPipeError is raised
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
