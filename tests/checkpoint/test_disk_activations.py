"""Hidden states in files: which generations there are while a thread keeps the layer before."""

from __future__ import annotations

import torch

from optimum_arb.calibration.activations import INPUTS
from optimum_arb.checkpoint import disk_activations
from optimum_arb.checkpoint.disk_activations import DiskActivations


def put(hidden: DiskActivations, value: int) -> None:
    for batch in range(2):
        hidden.put(batch, torch.full((1, 3, 4), float(value + batch)))


def generations(hidden: DiskActivations) -> list[str]:
    return sorted(path.name for path in hidden.directory.iterdir())


def test_what_the_manifest_names_stays_and_so_does_what_comes_later(tmp_path):
    hidden = DiskActivations(tmp_path / "hidden")
    put(hidden, 0)
    hidden.advance(INPUTS)
    put(hidden, 10)
    hidden.advance("layer 0")
    first = hidden.state
    put(hidden, 20)
    hidden.advance("layer 1")
    second = hidden.state
    put(hidden, 30)  # of layer 2, which is at work
    assert generations(hidden) == ["00001.hidden", "00002.hidden", "00003.hidden", "00004.hidden"]
    hidden.drop_stale(first)
    assert generations(hidden) == ["00002.hidden", "00003.hidden", "00004.hidden"]
    hidden.drop_stale(second)
    assert generations(hidden) == ["00003.hidden", "00004.hidden"]
    assert [float(hidden[batch].mean()) for batch in range(2)] == [20.0, 21.0]
    hidden.advance("layer 2")
    assert [float(hidden[batch].mean()) for batch in range(2)] == [30.0, 31.0]
    hidden.clear()
    # killed before the manifest named layer 2
    again = DiskActivations(tmp_path / "hidden", second)
    assert not again.restore("layer 2")
    assert again.restore("layer 1")
    assert [float(again[batch].mean()) for batch in range(2)] == [20.0, 21.0]
    assert generations(again) == ["00003.hidden"]
    again.clear()


def test_a_generation_is_synchronized_by_who_keeps_it(tmp_path, monkeypatch):
    """Not by the walk: 4.3 GB a layer of a 7B with error correction."""
    synchronized = []
    monkeypatch.setattr(disk_activations, "synchronize", lambda *paths: synchronized.extend(paths))
    hidden = DiskActivations(tmp_path / "hidden")
    put(hidden, 0)
    hidden.advance(INPUTS)
    put(hidden, 10)
    hidden.advance("layer 0")
    kept = hidden.state
    put(hidden, 20)
    hidden.advance("layer 1")
    assert synchronized == []
    hidden.synchronize(kept)
    assert synchronized == [tmp_path / "hidden" / "00002.hidden", tmp_path / "hidden"]
    hidden.clear()
