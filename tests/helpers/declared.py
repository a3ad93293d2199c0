"""The test forms of methods, from the class attribute `examples` of each method."""

from __future__ import annotations

import pytest

from pondera.core import spec


def forms(seam: str) -> dict[str, dict[str, str]]:
    """Spec strings by case and kind: ``{"H2O": {"exact": ..., "tight": ...}, "H2O-share": {...}}``.

    A case is a method, or a method and the name of a further form. Methods of ``PONDERA_METHODS`` are included.
    """
    found: dict[str, dict[str, str]] = {}
    for method in spec.index((seam,)).values():
        found[method.name] = {}
        for name, text in method.examples.items():
            kind, dash, form = name.partition("-")
            found.setdefault(f"{method.name}{dash}{form}", {})[kind] = text
    return found


def form(declared: dict[str, dict[str, str]], case: str, kind: str) -> str:
    """The spec string of a case; skips the test if the method declares no form of this kind."""
    if kind not in declared[case]:
        pytest.skip(f"{case} declares no {kind} form")
    return declared[case][kind]
