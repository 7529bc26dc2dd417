"""Lets transformers find optimum_arb by itself: models load without `import optimum_arb`.

transformers has no way to discover quantizers of other packages. PyTorch has one for its own extensions: every
`import torch` calls the entry points of the group `torch.backends`, and `activate` is one of them. It imports neither
torch nor transformers nor optimum_arb. All that it does is to wait, by a finder in `sys.meta_path`, for
`transformers.quantizers.auto`, whose two tables of quantizers then answer for "arb" as well, by importing optimum_arb
when, and only when, a model of that method is loaded.

It is a module of its own, since one inside the package would execute `optimum_arb/__init__.py`, and torch with it.
Nothing here may raise while torch is imported: that would break `import torch` for everybody.

Switched off by `OPTIMUM_ARB_AUTOLOAD=0`, and, with all extensions of torch, by `TORCH_DEVICE_BACKEND_AUTOLOAD=0`;
`import optimum_arb` then does the same.
"""

from __future__ import annotations

import os
import sys
from types import MethodType

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

VARIABLE = "OPTIMUM_ARB_AUTOLOAD"
METHOD = "arb"
TABLES = ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING")
REGISTRY = "transformers.quantizers.auto"
# The second is for the case that the first was being imported already: it imports the first, and so ends after it.
WATCHED = (REGISTRY, "transformers.modeling_utils")


class _Table(dict):
    """A table of transformers that imports optimum_arb, which then registers itself, when it is asked for "arb"."""

    def _ask(self, key: Any) -> None:
        if key == METHOD and not dict.__contains__(self, METHOD):
            try:
                import optimum_arb  # noqa: F401
            except Exception as error:
                raise ImportError(
                    f"This model is binarized by optimum_arb, which is installed but cannot be imported: {error}. "
                    "Install it again, or another version: pip install -U optimum-arb"
                ) from error

    def __contains__(self, key: Any) -> bool:
        self._ask(key)
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self._ask(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._ask(key)
        return super().get(key, default)


class _Finder:
    """Finds nothing itself: it has the modules of `WATCHED` call `_extend` after their own execution."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in WATCHED:
            return None
        try:
            for finder in sys.meta_path:
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    _extend_after(spec)
                    return spec
        except Exception:
            pass  # whatever it is, the import that is under way will meet it without us
        return None


def _extend_after(spec: ModuleSpec) -> None:
    """Has the loader of a module, an object of this module alone, extend the tables once the module is executed."""
    loader: Any = spec.loader
    execute = loader.exec_module

    def exec_module(self: Any, module: ModuleType) -> None:
        execute(module)
        _extend()

    loader.exec_module = MethodType(exec_module, loader)


def _extend() -> None:
    """Puts a `_Table` in the place of each table of transformers that is there; does nothing the second time."""
    try:
        module = sys.modules.get(REGISTRY)
        for name in TABLES:
            table = getattr(module, name, None)
            if isinstance(table, dict) and not isinstance(table, _Table):
                setattr(module, name, _Table(table))
    except Exception:
        pass  # without the tables, `import optimum_arb` still registers


def activate() -> None:
    """The entry point: called by `import torch`, once."""
    try:
        if os.environ.get(VARIABLE, "1").strip().lower() in ("0", "false", "no", "off"):
            return
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        _extend()
    except Exception:
        pass
