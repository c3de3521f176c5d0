"""Signals that ask a run to finish the step, save, and end.

The handler only stores the signal, and ranks agree at the end of the step. A save in a handler
would hang: torchrun sends SIGTERM to the survivors when a rank dies, and a save takes all ranks.
"""

import signal
import threading
from types import FrameType
from typing import Any, ClassVar

from titan_shampoo.stopping import handled_signals


class StopRequest:
    """Stores a signal that asks this process to stop; further signals change nothing.

    A scheduler often signals torchrun and the workers, and torchrun then signals them again.
    """

    any_received: ClassVar[bool] = False
    """True if this process was ever asked to stop: other ranks may have left already."""

    def __init__(self) -> None:
        """Handle the signals, if this is the main thread: Python allows it in no other."""
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._remember) for number in handled_signals()
            }

    def release(self) -> None:
        """Restore the handlers, except where another one was installed since."""
        while self._before:
            number, handler = self._before.popitem()
            if signal.getsignal(number) == self._remember:
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        StopRequest.any_received = True
