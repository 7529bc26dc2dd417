"""The bundled texts: WikiText-2's validation split to calibrate on, its test split to measure perplexity on."""

from __future__ import annotations

from importlib.resources import files

# The test split is never a calibration text: a perplexity measured on what was calibrated on says nothing.
BUNDLED_TEXTS = {
    "wikitext-2": "wikitext-2/wiki.valid.tokens.txt",
    "wikitext-2-test": "wikitext-2/wiki.test.tokens.txt",
}


def bundled_text(name: str) -> str:
    """A bundled text (licence and origin: `wikitext-2/README.md` beside this file).

    Args:
        name: "wikitext-2" (validation split, for calibration) or "wikitext-2-test" (test split, for perplexity).

    Raises:
        ValueError: no bundled text has this name.
    """
    if name not in BUNDLED_TEXTS:
        raise ValueError(f"There is no bundled text {name!r}: use one of {', '.join(BUNDLED_TEXTS)}.")
    path = files(__name__)
    for part in BUNDLED_TEXTS[name].split("/"):
        path = path / part
    return path.read_text(encoding="utf-8")
