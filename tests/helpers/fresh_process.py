"""A cache of built models: a test gets a copy, because copying a model is several times faster than building it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
M = TypeVar("M")


def copies(build: Callable[P, M]) -> Callable[P, M]:
    """Calls `build` once per arguments and returns copies of the result, so that tests cannot change each other's models.

    Each call sets the random state to the state after building, so that the random numbers of a test do not depend on the
    order of tests. Tests of building, and tests that change how models are built, must not use this.
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
