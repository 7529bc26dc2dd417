"""What few tokens' copies were made of is asked for at each call on a GPU; the question itself needs none."""

from __future__ import annotations

import torch

from optimum_arb.nn.plans import Sources


def tensors() -> dict[str, torch.Tensor | None]:
    signs = {key: torch.zeros(4, 2, dtype=torch.uint8) for key in ("weight", "weight_inner")}
    return {**signs, "row_scale": torch.ones(4), "col_scale": None, "bias": torch.zeros(4)}


def sources(values: dict[str, torch.Tensor | None]) -> Sources:
    return Sources(([(values, key) for key in values], values["bias"]))


def test_signs_of_any_part_that_are_replaced_are_seen():
    for key in ("weight", "weight_inner"):
        values = tensors()
        found = sources(values)
        assert found.same()
        values[key] = values[key].clone()
        assert not found.same(), key


def test_signs_whose_memory_is_replaced_are_seen():
    values = tensors()
    found = sources(values)
    values["weight_inner"].data = values["weight_inner"].clone()
    assert not found.same()


def test_what_is_written_in_place_is_seen_but_the_bias():
    for key in ("weight", "weight_inner", "row_scale", "bias"):
        values = tensors()
        found = sources(values)
        values[key].add_(1)
        assert found.same() == (key == "bias"), key


def test_tensors_of_inference_have_no_versions_to_compare():
    with torch.inference_mode():
        values = tensors()
        found = sources(values)
        assert found.same()
        values["weight"] = values["weight"].clone()
        assert not found.same()
