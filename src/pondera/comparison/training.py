"""Trains the missing runs of a comparison, in this process or several at the same time.

Runs that train in processes of their own read their config from ``OUT/configs`` and write their output to ``OUT/logs``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pondera.core.errors import Failure, Interrupted, UserError
from pondera.core.run_config import RunConfig
from pondera.core.run_folder import Run, is_run, write_atomic


def train_all(folders: dict[Path, RunConfig], progress: bool, jobs: int) -> None:
    """Trains the missing runs: in this process, or `jobs` at a time in processes of their own."""
    from pondera.data.corpus import prepare

    texts = {repr(config.data): config.data for config in folders.values()}
    digests = {key: prepare(data).digest for key, data in texts.items()}
    missing = {
        folder: config for folder, config in folders.items() if not finished(folder, config, digests[repr(config.data)])
    }
    if jobs > 1 and len(missing) > 1:
        _train_apart(missing, jobs, progress)
        return
    from pondera.training.train import train

    for folder, config in missing.items():
        say(progress, f"training {folder.name}")
        train(config, folder, resume=is_run(folder), progress=progress)


def finished(folder: Path, config: RunConfig, digest: str) -> bool:
    """Whether the run exists and is complete; refuses a run with another config or text.

    Args:
        folder: the folder of the run.
        config: the expected config.
        digest: the digest of the current corpus of `config`.
    """
    if not is_run(folder):
        return False
    run, advice = Run.open(folder), "use another --out, or remove that folder"
    if run.config.to_dict() != config.to_dict():
        raise UserError(f"{folder}: contains a run with another config; {advice}")
    result = run.result()
    if result is not None and result.get("corpus", digest) != digest:
        raise UserError(f"{folder}: contains a run on another text, or {config.data.text!r} has changed; {advice}")
    return result is not None


def _train_apart(missing: dict[Path, RunConfig], jobs: int, progress: bool) -> None:
    """Trains each run in a process of its own, `jobs` at a time; a failure or a signal stops all of them."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting, running = list(missing), dict[Path, subprocess.Popen]()
    with _noticed_signals() as noticed:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    folder = waiting.pop(0)
                    say(progress, f"training {folder.name}")
                    running[folder] = _start(folder, missing[folder], threads)
                time.sleep(0.1)
                for folder in [folder for folder, child in running.items() if child.poll() is not None]:
                    code = running.pop(folder).returncode
                    if code:
                        say(progress and bool(running), f"{folder.name} ended early; stopping the others")
                        raise ended_early(folder, code)
                    say(progress, f"trained {folder.name}")
                if noticed:
                    raise Interrupted("stopped")
        finally:
            _stop(list(running.values()))


def _start(folder: Path, config: RunConfig, threads: int) -> subprocess.Popen:
    """Starts `pondera train` on a config file that is kept, so that the command in the run's env.json works again."""
    import yaml

    recipe, log = (_beside(folder, kind) for kind in ("configs", "logs"))
    for path in (recipe, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(recipe, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    words = ["train", str(recipe), "--out", str(folder), *(["--resume"] if is_run(folder) else [])]
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pondera", *words],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # otherwise Ctrl-C reaches the child twice (directly and from us), and it loses its step
        )


def _beside(folder: Path, kind: str) -> Path:
    return folder.parents[1] / kind / f"{folder.name}.{'yaml' if kind == 'configs' else 'txt'}"


def ended_early(folder: Path, code: int) -> Exception:
    """The exception for a training process that ended with this exit code, with the last message of its log."""
    log = _beside(folder, "logs")
    lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
    # The last message may have several lines.
    last = max((number for number, line in enumerate(lines) if line.startswith("pondera: ")), default=len(lines) - 1)
    message = "\n".join(lines[last:]).removeprefix("pondera: ")
    if code in (130, -signal.SIGINT, -signal.SIGTERM):
        return Interrupted(f"{folder} was interrupted")
    kind = UserError if code == 2 else Failure
    return kind(f"{folder}: {message}\n(full log: {log})")


def _stop(children: list[subprocess.Popen]) -> None:
    """Asks the children to finish their step and save, and waits; another interrupt kills them."""
    try:
        for child in children:
            child.send_signal(signal.SIGINT)
        for child in children:
            child.wait()
    finally:
        for child in children:
            child.kill()


@contextmanager
def _noticed_signals() -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM; the second one has its normal effect."""
    noticed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noticed
        return

    def notice(number: int, _: Any) -> None:
        noticed.append(number)
        restore()

    def restore() -> None:
        for number, before in previous.items():
            signal.signal(number, before)

    previous = {number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noticed
    finally:
        restore()


def say(progress: bool, text: str) -> None:
    """Prints one line to stderr."""
    if progress:
        print(text, file=sys.stderr, flush=True)
