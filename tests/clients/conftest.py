"""Other people's programs around an `AdaptiveLM`: models and data that are small enough for them to run in a moment."""

from __future__ import annotations

import warnings

import pytest


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
