"""The first SIGINT or SIGTERM asks a loop to stop, the second one stops it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals(ask: Callable[[], None], speak: bool = True) -> Iterator[None]:
    """Context manager: the first signal calls `ask`, after which the second one stops the process immediately.

    Args:
        ask: tells the loop to save and stop after the current step.
        speak: print on stderr that the loop will stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def asked(number: int, _: Any) -> None:
        ask()
        for which, before in previous.items():
            signal.signal(which, before)
        if speak:
            # os.write, because the signal may interrupt print itself.
            os.write(2, b"\nfinishing this step and saving; send the signal again to stop immediately\n")

    previous = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
