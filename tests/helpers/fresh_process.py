"""Models that are built once and copied for every test: building one takes several times as long as copying it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
M = TypeVar("M")


def copies(build: Callable[P, M]) -> Callable[P, M]:
    """Builds once for the same arguments, then hands out copies: what a test does to its model reaches no other.

    The random state is left as building leaves it, so that what a test draws next does not depend on who came first. A test
    of building itself, or one that changes how models are built, builds its own.
    """
    made: dict[str, tuple[Any, torch.Tensor]] = {}

    @functools.wraps(build)
    def copied(*args: P.args, **kwargs: P.kwargs) -> M:
        key = repr((args, sorted(kwargs.items())))
        if key not in made:
            made[key] = build(*args, **kwargs), torch.get_rng_state()
        model, state = made[key]
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    return copied
