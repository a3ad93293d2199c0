"""The run folder: all files that training writes and reports read.

    RUN/  config.yaml    the RunConfig                  env.json      versions, machine, command line, commit, seed
          metrics.jsonl  one JSON object per line       result.json   the final scores and costs
          checkpoints/   step-000100/, ...              traces/       passes and losses by token; depths.json
          model/         the final Hugging Face folder

Files are either replaced atomically, or an incomplete write is detected when they are read.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pondera.core import run_config
from pondera.core.errors import UserError
from pondera.core.run_config import RunConfig

MARKS = ("config.yaml", "env.json")  # a folder with both is a run folder


class Config(Protocol):
    """The settings of a run of any kind."""

    @property
    def train(self) -> Any: ...

    def to_dict(self) -> dict[str, Any]: ...


Kind = TypeVar("Kind", bound=Config)

CHECKPOINT = re.compile(r"step-(\d+)")
PACKAGES = ("pondera", "torch", "transformers", "tokenizers", "datasets", "numpy")


class Run:
    """One run folder, created by `Run.create` or opened by `Run.open`.

    Example:
        >>> import tempfile
        >>> run = Run.create(tempfile.mkdtemp() + "/plain", RunConfig(name="plain"))
        >>> run.log(step=10, tokens=20480, loss=5.1)
        >>> Run.open(run.path).metrics()
        [{'step': 10, 'tokens': 20480, 'loss': 5.1}]
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.env_file = self.path / "env.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.result_file = self.path / "result.json"
        self.checkpoints_dir = self.path / "checkpoints"
        self.model_dir = self.path / "model"
        self.traces_dir = self.path / "traces"

    @classmethod
    def create(cls, path: str | Path, config: Config, exist_ok: bool = False) -> Run:
        """Creates the folder and writes `config.yaml` and `env.json`.

        Args:
            path: the folder; missing parents are created.
            config: settings of the run.
            exist_ok: allow a folder that contains files (existing metrics and checkpoints stay).

        Raises:
            UserError: the folder is not empty and `exist_ok` is false, or `path` is a file.
        """
        import yaml

        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise UserError(f"{run.path} is a file; give the name of a folder for the run")
        if not exist_ok and run.path.is_dir() and any(run.path.iterdir()):
            what = "already contains a run" if is_run(run.path) else "is not empty"
            raise UserError(f"{run.path} {what}; give another folder, or resume the run")
        run.path.mkdir(parents=True, exist_ok=True)
        write_atomic(run.env_file, _json(environment(config.train.seed), indent=2) + "\n")
        write_atomic(run.config_file, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Opens an existing run folder.

        Raises:
            UserError: no such folder, or it is not a run folder (the message says what is missing).
        """
        run = cls(path)
        if not run.path.is_dir():
            raise UserError(f"no such run folder: {str(path)!r}; give the folder that `pondera train` wrote")
        missing = [name for name in MARKS if not (run.path / name).is_file()]
        if missing:
            raise UserError(f"{run.path} is not a run folder: {' and '.join(missing)} missing")
        return run

    @property
    def config(self) -> RunConfig:
        """The settings in `config.yaml`."""
        return self.config_of(RunConfig)

    def config_of(self, kind: type[Kind]) -> Kind:
        """The settings in `config.yaml`, of a run of this kind.

        Raises:
            UserError: the run is of another kind, or the file is damaged.
        """
        try:
            return run_config.from_dict(run_config.read(self.config_file), kind)
        except UserError as error:
            raise UserError(f"{self.config_file}: {error}") from None

    @property
    def env(self) -> dict[str, Any]:
        """The environment of the run, from `env.json`."""
        return _read_json(self.env_file)

    def log(self, **values: Any) -> None:
        """Appends one line to `metrics.jsonl` and flushes it; NaN and infinity become null."""
        with open(self.metrics_file, "ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":  # remove a line that is incomplete after a crash
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write((_json(values) + "\n").encode())

    def metrics(self) -> list[dict[str, Any]]:
        """All logged lines, in order; an incomplete last line is ignored.

        Raises:
            UserError: a line other than the last is not JSON.
        """
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_bytes().split(b"\n")[:-1]  # text after the last newline is incomplete
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                found.append(_object(line))
            except ValueError:
                message = f"{self.metrics_file}, line {number}: not a JSON object; delete the line to continue"
                raise UserError(message) from None
        return found

    def truncate_after(self, step: int) -> None:
        """Removes the logged lines of later steps, so that a resumed run logs each step once."""
        kept = [line for line in self.metrics() if line.get("step", 0) <= step]
        write_atomic(self.metrics_file, "".join(_json(line) + "\n" for line in kept))

    def write_result(self, values: dict[str, Any]) -> None:
        """Writes the final scores and costs; a run with this file is finished."""
        write_atomic(self.result_file, _json(values, indent=2) + "\n")

    def result(self) -> dict[str, Any] | None:
        """The final scores and costs, or `None` while the run is unfinished."""
        return _read_json(self.result_file) if self.result_file.is_file() else None

    def write_trace(self, name: str, values: dict[str, Any]) -> None:
        """Writes `traces/NAME.json`: one sequence (``{"tokens": [str], "passes": [float], "nll": [float]}``) or statistics."""
        self.traces_dir.mkdir(exist_ok=True)
        write_atomic(self.traces_dir / f"{name}.json", _json(values) + "\n")

    def traces(self) -> dict[str, dict[str, Any]]:
        """All traces, by name."""
        return {path.stem: _read_json(path) for path in sorted(self.traces_dir.glob("*.json"))}

    @contextmanager
    def saving(self, step: int) -> Iterator[Path]:
        """Context manager that yields a temporary checkpoint folder and renames it to its final name on success.

        Example::

            with run.saving(100) as folder:
                model.save_pretrained(folder)
        """
        final = self.checkpoints_dir / f"step-{step:06d}"
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, earliest step first."""
        found = []
        for path in self.checkpoints_dir.glob("step-*"):
            match = CHECKPOINT.fullmatch(path.name)
            if match and path.is_dir() and any(path.iterdir()):
                found.append((int(match[1]), path))
        return [path for _, path in sorted(found)]


def is_run(path: str | Path) -> bool:
    """Whether a folder is a run folder."""
    return all((Path(path) / name).is_file() for name in MARKS)


def write_atomic(path: Path, text: str | bytes) -> None:
    """Replaces a file atomically: readers see the old or the new content, never a part.

    Raises:
        OSError: the new content cannot be written, e.g. because the disk is full; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def environment(seed: int) -> dict[str, Any]:
    """The environment of a run: what is needed to repeat it or to explain a difference."""
    torch = sys.modules.get("torch")  # without torch there is no thread count to record
    return {
        "command": _command(),
        "seed": seed,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads() if torch else None,
        "device": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else platform.machine(),
    }


def _command() -> str:
    """The command line to repeat the run; `pondera` is written without its path."""
    program = Path(sys.argv[0])
    ours = program.name == "pondera" or program.parts[-2:] == ("pondera", "__main__.py")
    return shlex.join(["pondera" if ours else sys.argv[0], *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The git commit of this source tree, with "-dirty" if it has changes; `None` outside a checkout."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(value), allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """Converts a value to JSON types: tensors and arrays to lists or numbers, NaN and infinity to null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _object(text: bytes) -> dict[str, Any]:
    loaded = json.loads(text)
    if not isinstance(loaded, dict):
        raise ValueError(f"expected a JSON object, found {type(loaded).__name__}")
    return loaded
