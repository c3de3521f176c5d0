"""A signal means: finish the step, save, and end well.

Nothing is saved in a handler: torchrun sends SIGTERM to the survivors when a rank dies, and what
only some ranks do together hangs. A handler only remembers; ranks agree at the end of the step.
"""

import signal
import threading
from types import FrameType
from typing import Any, ClassVar

from titan_shampoo.stopping import heeded


class StopRequest:
    """Remembers a signal that asked this process to stop; more of them change nothing.

    A scheduler often signals torchrun and the workers, and torchrun then signals them again.
    """

    any_received: ClassVar[bool] = False
    """Whether this process was ever asked to stop: other ranks may have left already."""

    def __init__(self) -> None:
        """Take over the signals, if this is the main thread: no other may."""
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in heeded()}

    def release(self) -> None:
        """Give back the signals that nobody else has taken over."""
        while self._before:
            number, handler = self._before.popitem()
            if signal.getsignal(number) == self._remember:
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        StopRequest.any_received = True
