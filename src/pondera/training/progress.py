"""Training progress on stderr: a bar on a terminal, otherwise lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressMeter:
    """Shows the progress of a training run on stderr.

    Args:
        steps: the total number of steps.
        first_step: the number of completed steps.
        show: if false, nothing is shown.
    """

    def __init__(self, steps: int, first_step: int = 0, show: bool = True) -> None:
        self.steps, self.first_step, self.show = steps, first_step, show
        self.validated = ""
        self.started = time.monotonic()
        console = Console(stderr=True)
        self._bar = None
        if show and console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=steps, completed=first_step)

    def __enter__(self) -> ProgressMeter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, tokens_per_second: float, logged: bool) -> None:
        """Reports a completed step.

        Args:
            step: the number of completed steps.
            loss: of this step, or the mean since the last logged line if `logged`.
            tokens_per_second: mean over the last steps.
            logged: whether this step was also written to the metrics.
        """
        validated = f"  {self.validated}" if self.validated else ""
        text = f"loss {loss:.4f}{validated}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self.show and logged:
            pace = (time.monotonic() - self.started) / max(1, step - self.first_step)
            left = int(pace * (self.steps - step))
            print(f"step {step}/{self.steps}  {text}  {left // 60}:{left % 60:02d} left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.show:
            print(text, file=sys.stderr, flush=True)
