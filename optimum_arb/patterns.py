"""Patterns of module names, as users write them in `modules_to_not_convert` and `overrides`."""

from __future__ import annotations

import re


def check_pattern(pattern: str) -> None:
    """Raises ValueError where a pattern is empty or its regular expression does not compile."""
    if not isinstance(pattern, str) or not pattern.strip():
        raise ValueError(f"The module pattern {pattern!r} must be a suffix of module names or begin with 're:'.")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"The module pattern {pattern!r} is no regular expression: {error}.") from None


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a module's name: "re:..." the whole name, anything else as a suffix at a dot."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern)
