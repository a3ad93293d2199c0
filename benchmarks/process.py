"""Sides of a benchmark that need a process of their own, and what a process holds of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Process:
    """A benchmark's own script as a worker, in a process of its own, perhaps of another environment.

    Args:
        script: answers each line of JSON with one, given ``--worker``.
        python: that runs it.
        threads: of torch.
        words: further ones of its command.
    """

    def __init__(self, script: str, python: str, threads: int, *words: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)  # our packages are not theirs
        command = [python, script, "--worker", "--threads", str(threads), *words]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a process ended early, asked for {request}; what it said stands above")
        return json.loads(answer)

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def resident(kind: str) -> int | None:
    """``"VmRSS"`` now, ``"VmHWM"`` at most since the peak was forgotten; none where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(kind)), None)
