"""`optimum-arb` and `optimum-cli arb`: interrupted while torch and transformers are imported, they say so in a line.

Their import takes seconds, and an interruption there is a traceback of theirs, or an abort of the process where torch
is in C++. Nothing has begun by then, so the process just ends. A module of its own, since one inside the package would
execute `optimum_arb/__init__.py`, and import both, before its first line.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType


def main(argv: Sequence[str] | None = None, prog: str = "optimum-arb") -> int:
    """Runs a command, see `optimum_arb.commands.main.main`."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{prog}: interrupted\n".encode())  # not print, which may be what was interrupted
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler  # else it is ignored, as in the background of a shell
    if ours:
        signal.signal(signal.SIGINT, end)
    from optimum_arb.commands.main import main as run

    if ours:
        signal.signal(signal.SIGINT, before)
    return run(argv, prog)


if __name__ == "__main__":
    sys.exit(main())
