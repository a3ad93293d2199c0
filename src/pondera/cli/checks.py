"""What can be refused before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pondera.ground import settings, spec
from pondera.ground.errors import UserError
from pondera.ground.run import is_run
from pondera.ground.settings import RunConfig


def load_config(source: str, overrides: dict[str, Any]) -> RunConfig:
    """A checked config whose methods exist, from a recipe or file and dotted overrides."""
    config = settings.load(source, overrides)
    for seam in spec.SEAMS:
        text = getattr(config, seam)
        if text is not None:
            try:
                spec.find(spec.parse(text).name, seam)
            except UserError as error:
                raise UserError(f"{seam}: {error}") from None
    return config


def check_model_path(path: str) -> None:
    """Refuses what can be neither a run folder nor a model folder.

    Raises:
        UserError: no such folder, or it holds neither.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{path!r} {what}; give a run folder that `pondera train` wrote, or a model folder")
    if not is_run(folder) and not (folder / "config.json").is_file():
        raise UserError(
            f"{path!r} holds neither a run (config.yaml, env.json) nor a model (config.json); give a run folder that "
            "`pondera train` wrote, or a model folder"
        )
