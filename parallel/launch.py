"""torchrun with readable errors: a stopped or misconfigured run ends with one line about it.

    python -m parallel.launch --standalone --nproc_per_node=2 train.py --job.config_file F

Takes torchrun's arguments. torchrun ends every signalled run and every failed rank with its own
tracebacks and exit code 1. Here a signal is forwarded to the ranks, which save and exit; only
SIGQUIT ends them at once. The exit code is 0 if the last step was done, or if the run was stopped
and saved; 2 if a rank has reported an error; 128 plus the number of the signal if a signal ended
the run and nothing was saved; 1 otherwise.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from titan_shampoo.stopping import STOP_SIGNALS, handled_signals


class Stop:
    """Signals that ask the run to stop, and the ranks that receive them."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal."""
        self._ranks: Sequence[int] | None = None
        self._ignored = {*STOP_SIGNALS} - {*handled_signals()}

    def listen(self) -> None:
        """Install the handlers, and install them again after torchrun has replaced them."""
        for number in (*STOP_SIGNALS, signal.SIGQUIT):
            ignored = number in self._ignored
            signal.signal(number, signal.SIG_IGN if ignored else self._pass_on)

    def begin(self) -> None:
        """Hold signals back while ranks are started, so that no rank is left behind."""
        self._ranks = ()

    def watch(self, ranks: Sequence[int]) -> None:
        """Forward earlier and later signals to these processes."""
        self._ranks = ranks
        if self.received:
            self._send(self.received)

    def leave(self, number: int, why: str) -> int:
        """Report that a signal ended the run; return the exit code."""
        with suppress(OSError):  # the terminal may be closed
            sys.stderr.write(f"stopped by {signal.Signals(number).name}: {why}\n")
            sys.stderr.flush()
        return 128 + number

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if self._ranks is None:
            os._exit(self.leave(number, "no rank was started yet"))
        self._send(number)

    def _send(self, number: int) -> None:
        # One signal for all: SIGINT would raise in a rank that is still starting.
        sent = signal.SIGKILL if number == signal.SIGQUIT else signal.SIGTERM
        for rank in self._ranks or ():
            with suppress(ProcessLookupError):
                os.kill(rank, sent)


def main(args: list[str]) -> int:
    """Run ``args`` like torchrun, and return the exit code."""
    stop = Stop()
    stop.listen()
    from parallel.agent import run_ranks  # noqa: PLC0415 (imports torch, which takes seconds)

    return run_ranks(args, stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
