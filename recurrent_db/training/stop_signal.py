"""SIGINT and SIGTERM end a run after the step in flight, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading


class StopSignal:
    """The last signal that came: ``number``, 0 for none.

    Handlers are installed in the main thread alone, where Python allows it, and given back when ``held`` closes.
    """

    def __init__(self, held: contextlib.ExitStack) -> None:
        self.number = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                held.callback(signal.signal, number, signal.signal(number, self._note))

    def _note(self, number: int, frame: object) -> None:
        self.number = number
