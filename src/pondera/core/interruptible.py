"""Long calls into compiled code that Ctrl-C shall end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")
LOOK = 0.2
"""Seconds between two looks at signals."""
LAST = 1.0
"""Seconds that work gets to end by itself after an interruption."""


def interruptible(
    work: Callable[[threading.Event], Result], waiting: Callable[[float], None] = lambda _: None
) -> Result:
    """Runs work in a thread of its own and waits for it, so that signals are heard while compiled code runs.

    Python handles a signal in the main thread and between two steps of its own code. A call that stays in compiled code for
    an hour is deaf that long. After an interruption such work runs on in its thread until it ends, or the process does.

    Args:
        work: gets an event that is set when nobody waits any more; where it can, it should end then.
        waiting: is told how many seconds the work has taken so far, again and again.

    Raises:
        KeyboardInterrupt, or whatever a signal handler raises; and what the work raises.

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
