"""Cases of a test that several processes binarize together and one alone, and what comes of them.

A test file has a function `worker(folder, *names)`, which calls `binarize_cases`; its fixtures are made by `together`
and `by_one`, of a fixture `sources`, the folder of the float models.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import check, run_ranks

from optimum_arb import model_report
from optimum_arb.calibration.distributed import distributed
from optimum_arb.calibration.ranks import OtherRankFailed

Patch = pytest.MonkeyPatch


def binarize_cases(
    folder: Path,
    names: Iterable[str],
    binarize: Callable[[str], Any],
    count: Callable[[Patch], Counter],
    failures: Iterable[str] = (),
    fail: Callable[[Patch, str, int], None] = lambda patch, failure, rank: None,
) -> None:
    """One rank: binarizes cases, then fails in every way; leaves what comes of it in the folder.

    Args:
        folder: the folder.
        names: of the cases.
        binarize: makes the model of a case.
        count: begins to count calls.
        failures: ways to fail.
        fail: binarizes a model in which this rank fails in one of them, or the other one does.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    counts, reports, errors = {}, {}, {}
    with distributed():
        for name in names:
            with Patch.context() as patch:
                calls = count(patch)
                model = binarize(name)
                counts[name] = dict(calls)
                reports[name] = errors_of(model)
            torch.save(dict(model.state_dict()), folder / f"{name} {rank} of {size}.pt")
    for failure in failures:
        with (
            pytest.raises((OtherRankFailed, ValueError, ZeroDivisionError)) as raised,
            distributed(),
            Patch.context() as patch,
        ):
            fail(patch, failure, rank)
        errors[failure] = (raised.type.__name__, str(raised.value))
    found = {"counts": counts, "reports": reports, "errors": errors}
    (folder / f"{rank} of {size}.json").write_text(json.dumps(found))


def errors_of(model) -> list[list]:
    return [[each.name, each.weight_error, each.output_error] for each in model_report(model).modules]


def together(file: str, size: int, *names: str):
    """A fixture: the folder, where so many processes of a file's `worker` have been."""

    @pytest.fixture(scope="module")
    def folder(sources: Path) -> Path:
        check(run_ranks(file, "worker", sources, *names, ranks=size))
        return sources

    return folder


def by_one(binarize: Callable[[Path, str], Any]):
    """A fixture: a function that gives the model which one process makes of a case, by its name.

    Args:
        binarize: makes it, of the folder and the name.
    """

    @pytest.fixture(scope="module")
    def alone(sources: Path) -> Callable[[str], Any]:
        made: dict[str, Any] = {}

        def model(name: str) -> Any:
            if name not in made:
                made[name] = binarize(sources, name)
            return made[name]

        return model

    return alone


def said(folder: Path, kind: str, name: str, size: int = 2) -> list[Any]:
    """What each process has left of a case or failure: its "counts", "reports" or "errors"."""
    return [json.loads((folder / f"{rank} of {size}.json").read_text())[kind][name] for rank in range(size)]


def check_same(folder: Path, name: str, size: int, alone) -> None:
    """Each process has the bits of the model that one made, and its errors."""
    expected = alone.state_dict()
    for rank in range(size):
        found = torch.load(folder / f"{name} {rank} of {size}.pt")
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert said(folder, "reports", name, size) == size * [errors_of(alone)]
