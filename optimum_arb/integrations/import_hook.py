"""Runs a function once another library has been imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)


def after_import(name: str, action: Callable[[], None]) -> None:
    """Runs `action` now if the module is imported, else right after its import, if that ever happens.

    An error in `action` is logged as a warning: the import of a library must not fail because of this package.

    Args:
        name: full name of the module.
        action: what to do; it may import the module.
    """
    if name in sys.modules:
        _run(name, action)
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, action))


def _run(name: str, action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:
        logger.warning("optimum_arb could not adapt itself to %s: %s: %s", name, type(error).__name__, error)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as all other finders do, and wraps its loader. Stays until the module is really imported: many
    libraries only ask whether another one can be found."""

    def __init__(self, name: str, action: Callable[[], None]):
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads with another loader, then runs the action of a finder."""

    def __init__(self, loader: importlib.abc.Loader, finder: _Finder):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            _run(self.finder.name, self.finder.action)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
