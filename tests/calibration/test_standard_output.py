"""Nothing but results on standard output, whoever prints."""

from __future__ import annotations

import os

from optimum_arb.calibration.standard_output import to_standard_error


def test_what_is_written_meanwhile(capfd):
    os.write(1, b"before ")
    with to_standard_error():
        os.write(1, b"meanwhile")
    os.write(1, b"after")
    assert capfd.readouterr() == ("before after", "meanwhile")


def test_a_closed_standard_output(capfd):
    kept = os.dup(1)
    os.close(1)
    try:
        with to_standard_error():
            pass
    finally:
        os.dup2(kept, 1)
        os.close(kept)
