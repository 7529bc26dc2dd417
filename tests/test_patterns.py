import pytest

from optimum_arb.patterns import check_pattern, matches


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("down_proj", "model.layers.3.mlp.down_proj", True),
        ("down_proj", "down_proj", True),
        ("mlp.down_proj", "model.layers.3.mlp.down_proj", True),
        ("down_proj", "model.layers.3.mlp.up_down_proj", False),  # a suffix begins at a dot
        ("mlp", "model.layers.3.mlp.down_proj", False),
        ("re:.*layers\\.3\\..*", "model.layers.3.mlp.down_proj", True),
        ("re:layers", "model.layers.3.mlp.down_proj", False),  # an expression matches the whole name
        ("re:.*layers\\.3\\..*", "model.layers.33.mlp.down_proj", False),
    ],
)
def test_matches(pattern, name, expected):
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(("pattern", "message"), [("", "suffix"), ("  ", "suffix"), (3, "suffix"), ("re:[", "regular")])
def test_patterns_that_are_none(pattern, message):
    with pytest.raises(ValueError, match=message):
        check_pattern(pattern)
