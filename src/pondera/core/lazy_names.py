"""Names that a package offers and loads on first use (PEP 562): methods from the index, others from a table."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, seams: tuple[str, ...] | None, others: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's ``__getattr__`` and ``__dir__``.

    Methods are found by reading the files of their seams, so a new file needs no entry anywhere. Importing the package
    loads none of them.

    Args:
        package: its name.
        seams: the folders whose methods it offers, see `pondera.core.spec.index`; `None`: all folders.
        others: further names, each with the module that defines it.

    Example::

        __getattr__, __dir__ = lazy_names(__name__, ("kv_cache",), {})
    """

    def methods() -> dict[str, Any]:
        spec = importlib.import_module("pondera.core.spec")
        return spec.index(spec.SEAMS + spec.PARTS + spec.PROBES if seams is None else seams)

    def listed() -> list[str]:
        return sorted({*others, *methods()})

    def load(name: str) -> Any:
        if name in others:
            return getattr(importlib.import_module(others[name]), name)
        if name == "__all__":  # what `from package import *` takes
            return listed()
        if name.startswith("_"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # Import statements ask for submodules here, too; those have names in lower case, which no method has.
        known = methods() if name[0].isupper() else {}
        if name in known:
            return importlib.import_module("pondera.core.spec").load_class(known[name])
        folded = {one.lower(): one for one in [*others, *known]}
        near = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)]
        hint = f"did you mean {near[0]!r}?" if near else f"dir({package}) lists all names"
        raise AttributeError(f"module {package!r} has no attribute {name!r}; {hint}")

    return load, listed
