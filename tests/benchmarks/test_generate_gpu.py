"""benchmarks/generate_gpu.py on a tiny model."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("generate_gpu", "load_times", "random_packed", "speed_figures")
SMALL = ["--shape", "tiny", "--planes", "2", "--batch", "2", "--prompts", "4,8", "--new-tokens", "8"]


@pytest.fixture(scope="module")
def scripts():
    """The script's modules by their names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in MODULES:
            sys.modules.pop(name, None)


def check(path: Path, parts: dict[str, bool]) -> dict:
    """What every run with --disk writes; `parts` says of each speed whether more is better."""
    found = json.loads(path.read_text())
    assert found["failed"] == []
    figures = {(f["name"], f["planes"], f["batch"], f["prompt"]): f for f in found["figures"]}
    assert len(figures) == len(found["figures"])
    assert all(math.isfinite(f["value"]) and f["value"] > 0 for f in found["figures"])
    speeds = {key for key, figure in figures.items() if figure["speed"]}
    expected = {(name, planes, 2, 4) for name in parts for planes in (None, 2)}
    assert speeds == expected | {("prompt, ms", planes, 2, 8) for planes in (None, 2)}
    for name, _, batch, prompt in (key for key in speeds if key[1] is not None):
        base, packed = (figures[name, planes, batch, prompt] for planes in (None, 2))
        one, other = (packed, base) if parts[name] else (base, packed)
        assert packed["ratio"] == pytest.approx(one["value"] / other["value"])
        assert base["ratio"] is None
    ratios = [figures[key]["ratio"] for key in speeds if key[1] is not None]
    assert found["compared"] == len(ratios)
    assert found["below"] == sum(ratio < 0.95 for ratio in ratios)
    assert found["worst"]["ratio"] == min(ratios)
    plain, packed = found["disk"]
    assert (plain["planes"], packed["planes"]) == (None, 2)
    for entry in (plain, packed):
        assert entry["same_logits"] is True
        assert entry["largest_difference"] == 0
        assert len(entry["loads"]["cached"]) == 2
        assert entry["write_seconds"] > 0
    assert packed["bytes"] < plain["bytes"] / 2
    assert set(packed["loads"]) - {"cold"} == {"cached", "cached, not verified"}
    assert set(plain["loads"]) - {"cold"} == {"cached"}
    verified, unverified = (figures[f"load, {name}, s", 2, None, None] for name in packed["loads"] if name != "cold")
    base = figures["load, cached, s", None, None, None]["value"]
    for figure in (verified, unverified):
        assert figure["ratio"] == pytest.approx(base / figure["value"])
    return found


def test_on_the_cpu(scripts, tmp_path, capsys):
    path, disk = tmp_path / "figures.json", tmp_path / "models"
    options = [*SMALL, "--device", "cpu", "--disk", str(disk), "--loads", "2", "--json", str(path)]
    assert scripts.generate_gpu.main(options) == 0
    found = check(path, {"eager, tokens/s": True, "prompt, ms": False, "step, ms": False})
    assert found["device"] == "cpu"
    assert "compiled: transformers compiles on a GPU alone" in found["left_out"]
    assert list(disk.iterdir()) == []
    printed = capsys.readouterr().out
    assert "|  | batch | prompt | bfloat16 | 2 planes |" in printed
    assert f"Of {found['compared']} ratios of speed {found['below']} are below 0.95." in printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(scripts, tmp_path):
    path = tmp_path / "figures.json"
    options = [*SMALL, "--compiled-batch", "2", "--disk", str(tmp_path / "models"), "--loads", "2", "--json", str(path)]
    assert scripts.generate_gpu.main(options) == 0
    parts = {"eager, tokens/s": True, "prompt, ms": False, "step, ms": False, "compiled step, ms": False}
    parts["compiled, tokens/s"] = True
    found = check(path, parts)
    peaks = {(f["name"], f["planes"]): f["value"] for f in found["figures"] if "peak GB" in f["name"]}
    assert {name for name, _ in peaks} == {"eager, peak GB", "prompt, peak GB", "compiled, peak GB"}
    for entry in found["disk"]:  # no less than the weights, and not those of the other model too
        weights = entry["bytes"] / 1e9
        assert 0.9 * weights < peaks["eager, peak GB", entry["planes"]] < weights + 0.5


def test_a_load_that_goes_wrong_fails_the_run(scripts, tmp_path, monkeypatch, capsys):
    load = scripts.generate_gpu.load

    def changed(*args, **kwargs):
        model, seconds = load(*args, **kwargs)
        model.lm_head.weight[0] += 1
        return model, seconds

    monkeypatch.setattr(scripts.generate_gpu, "load", changed)
    path = tmp_path / "figures.json"
    options = ["--device", "cpu", "--disk", str(tmp_path), "--loads", "1", "--seconds", "0", "--json", str(path)]
    assert scripts.generate_gpu.main([*SMALL, *options]) == 1
    found = json.loads(path.read_text())
    assert [entry["same_logits"] for entry in found["disk"]] == [False, False]
    assert len(found["failed"]) == 2
    assert found["compared"] == 0
    assert "eager, batch 2, prompt 4: the 0 s were over" in found["left_out"]
    assert "No speed was compared" in capsys.readouterr().out


@pytest.mark.parametrize("permuted", [False, True])
def test_columns_are_permuted_on_request(scripts, permuted):
    model = scripts.random_packed.build("tiny", 1, "cpu", permuted)
    names = {name for name, _ in model.named_parameters() if name.endswith("weight_permutation")}
    assert len(names) == (14 if permuted else 0)
    layer = model.model.layers[0].mlp.down_proj
    plain = scripts.random_packed.build("tiny", None, "cpu").model.layers[0].mlp.down_proj
    assert (layer.in_features, layer.out_features) == (plain.in_features, plain.out_features) == (1408, 512)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_too_little_room_on_the_disk(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"0\.0 GB are to be written, and 0\.0 are free"):
        scripts.load_times.write(scripts.random_packed.build("tiny", 1, "cpu"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked")
def test_what_is_in_the_page_cache(scripts, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"0" * 20_000_001)
    assert scripts.load_times.cached_share(tmp_path) > 0.9
    if scripts.load_times.evict(tmp_path):  # no file system in memory can
        assert scripts.load_times.cached_share(tmp_path) < 0.02
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
            opened.read(10_000_000)
        assert 0.4 < scripts.load_times.cached_share(tmp_path) < 0.6


def test_ratios(scripts):
    figures = scripts.speed_figures.Figures()
    figures.add("step, ms", None, 1, 64, [4.0, 2.0, 3.0], speed=True)
    figures.add("eager, tokens/s", None, 1, 64, [10.0], speed=True)
    assert figures.ratios() == []
    assert figures.add("step, ms", 1, 1, 64, [6.0], speed=True).ratio == pytest.approx(0.5)
    rate = figures.add("eager, tokens/s", 1, 1, 64, [12.0, 8.0, 9.4], speed=True)
    assert rate.ratio == pytest.approx(0.94)
    assert (rate.worst, rate.best) == (8.0, 12.0)
    figures.add("on disk, GB", None, None, None, [1.0])
    assert figures.add("on disk, GB", 1, None, None, [10.0]).ratio == pytest.approx(0.1)  # of no speed
    assert figures.verdict() == (
        "Worst speed: step, ms, 1 plane, batch 1, prompt 64: 6, 0.50 times as good as bfloat16. "
        "Of 2 ratios of speed 2 are below 0.95."
    )
    assert figures.table([None, 1]).splitlines()[2:] == [
        "| step, ms | 1 | 64 | 3 | 6, 0.50x |",
        "| eager, tokens/s | 1 | 64 | 10 | 9.4, 0.94x |",
        "| on disk, GB |  |  | 1 | 10, 0.10x |",
    ]
