"""Signals that ask a run to stop, and their effect if there is nothing to save.

After its first step, a run that saves checkpoints finishes the current step and saves
(``checkpoint/signals.py``). Before that, and in any other run, a signal ends the process at once,
as it does for most programs, without a Python traceback.
"""

import ctypes
import os
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals of schedulers before they kill, of the keyboard, and of a closed terminal."""

_PR_SET_PDEATHSIG = 1


def handled_signals() -> list[signal.Signals]:
    """The signals that this process does not ignore (``nohup`` makes it ignore one)."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def end_at_once() -> None:
    """Let each signal end this process, and send it one when torchrun's agent ends.

    Otherwise the ranks of a killed agent would train on unnoticed.
    """
    for number in handled_signals():
        signal.signal(number, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a program may outlive its shell on purpose
        end_with_parent()


def end_with_parent() -> None:
    """Send this process a SIGTERM when its parent ends; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def ignore() -> None:
    """Ignore the signals: the work is done, or the parent decides."""
    for number in handled_signals():
        signal.signal(number, signal.SIG_IGN)
