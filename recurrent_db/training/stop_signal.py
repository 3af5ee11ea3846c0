"""SIGINT and SIGTERM end a run after the current step, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading


class StopSignal:
    """Records the last SIGINT or SIGTERM in ``number``; 0 means that none came.

    The handlers are installed only in the main thread, because Python allows no other. When ``held`` closes, the previous
    handlers return.
    """

    def __init__(self, held: contextlib.ExitStack) -> None:
        self.number = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                held.callback(signal.signal, number, signal.signal(number, self._note))

    def _note(self, number: int, frame: object) -> None:
        self.number = number
