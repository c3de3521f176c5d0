"""Signals that ask a run to stop, and what they do where there is nothing to save.

From its first step on, a run that saves checkpoints finishes the step and saves
(``checkpoint/signals.py``). Before, and in any other run, a signal ends the process as it ends most
programs: at once, wherever it is, and in no words of Python's.
"""

import ctypes
import os
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What schedulers send before they kill, the keyboard, a terminal that is closed."""

_PR_SET_PDEATHSIG = 1


def heeded() -> list[signal.Signals]:
    """The signals that this process does not ignore, as ``nohup`` has it do."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def end_at_once() -> None:
    """Let a signal end this process, and let the end of torchrun's agent be one.

    An agent that is killed leaves its ranks behind, which would go on training unseen.
    """
    for number in heeded():
        signal.signal(number, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a shell that ends may well leave a program behind
        end_with_parent()


def end_with_parent() -> None:
    """Let the end of the process that started this one be a SIGTERM; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def ignore() -> None:
    """Let no signal end this process: all is done, or its parent decides."""
    for number in heeded():
        signal.signal(number, signal.SIG_IGN)
