"""A small text, and tiny recipes that train on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import training_worker


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_worker.write_text(tmp_path_factory.mktemp("compare") / "text")


@pytest.fixture
def recipe(text: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes tiny recipes of four steps."""

    def write(name: str, think: str | None = None, **settings: Any) -> str:
        dotted = {f"train.{key}": value for key, value in settings.items()}
        config = training_worker.tiny(text, {"name": name, "think": think, "train.steps": 4, **dotted})
        return training_worker.write_config(tmp_path / f"{name}.yaml", config)

    return write
