"""Runs long calls into compiled code so that Ctrl-C can interrupt them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")
LOOK = 0.2
"""Seconds between two checks for signals."""
LAST = 1.0
"""Grace period in seconds for the work to end after an interruption."""


def interruptible(
    work: Callable[[threading.Event], Result], waiting: Callable[[float], None] = lambda _: None
) -> Result:
    """Runs `work` in a separate thread and waits for it, so that signals are handled while compiled code runs.

    Python handles a signal in the main thread, between two bytecode instructions. A long call into compiled code blocks
    signals until it returns. After an interruption the thread continues until the work ends or the process exits.

    Args:
        work: called with an event that is set after an interruption; if it can, it should end then.
        waiting: called every `LOOK` seconds with the seconds elapsed.

    Raises:
        KeyboardInterrupt: or any other exception of a signal handler, and any exception of the work.

    Example:
        >>> interruptible(lambda stop: 6 * 7)
        42
    """
    result: Future[Result] = Future()
    stop = threading.Event()

    def run() -> None:
        try:
            result.set_result(work(stop))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    looks = 0
    try:
        while thread.is_alive():
            thread.join(LOOK)
            looks += 1
            waiting(looks * LOOK)
    except BaseException:
        stop.set()
        thread.join(LAST)
        raise
    return result.result()
