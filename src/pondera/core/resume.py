"""When a run folder can be started, and when it can be continued."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from pondera.core.errors import UserError
from pondera.core.run_folder import Config, Run, is_run


def check_free(out: Path) -> None:
    """Refuses a folder for a new run that has something in it.

    Raises:
        UserError: it is a file, or not empty.
    """
    if out.is_file():
        raise UserError(f"{out} is a file; give the name of a folder for the run with --out")
    if out.is_dir() and any(out.iterdir()):
        what, advice = (
            ("already contains a run", "continue it with --resume, or ") if is_run(out) else ("is not empty", "")
        )
        raise UserError(f"{out} {what}; {advice}give another folder with --out")


def reopened(out: Path, config: Config, free: set[str]) -> Run:
    """Opens the run to resume; refuses if its settings differ.

    Args:
        out: the run folder.
        config: the settings now.
        free: dotted names of settings that may differ.

    Raises:
        UserError: it is not a run folder, or another setting differs.
    """
    run = Run.open(out)
    old, new = _flat(run.config_of(type(config)).to_dict()), _flat(config.to_dict())
    changed = [name for name in old | new if name not in free and old.get(name) != new.get(name)]
    if changed:
        listing = ", ".join(f"{name} ({old.get(name)} before, {new.get(name)} now)" for name in changed)
        raise UserError(
            f"{out} was started with other settings: {listing}; resume with {again(run.path)}, or use another --out"
        )
    return run


def again(path: Path) -> str:
    """The command that continues a run."""
    return f"pondera train {shlex.quote(str(path))} --resume"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
