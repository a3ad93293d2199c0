"""Worker processes of benchmarks, and the memory use of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Process:
    """Runs the script of a benchmark as a worker process, possibly in another environment.

    Args:
        script: with ``--worker``, it answers each line of JSON with one line of JSON.
        python: the interpreter.
        threads: the number of torch threads.
        words: further arguments of the command.
    """

    def __init__(self, script: str, python: str, threads: int, *words: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)  # the other environment has its own packages
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
            raise SystemExit(f"a worker ended at the request {request}; see its message above")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def resident(kind: str) -> int | None:
    """Memory of this process: ``"VmRSS"`` is the current value, ``"VmHWM"`` the peak; `None` if not on Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(kind)), None)
