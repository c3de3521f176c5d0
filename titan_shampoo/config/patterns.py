"""Patterns of parameter groups, matched within a bound: ``(a+)+$`` takes hours for some names."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from titan_shampoo.config.errors import ConfigError

_SECONDS = 5.0
"""Of processor time, which a busy machine takes no more of; milliseconds are usual."""


@contextmanager
def matching_bounded(what: str) -> Iterator[None]:
    """Bound the time that the matches in this block take together, in the main thread.

    Python's matcher looks for signals on its way; there is no other way to stop it.

    Args:
        what: The setting that is blamed.

    Raises:
        ConfigError: When the time is up, on every rank that matches the same names.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        yield
    except _OutOfTimeError:
        problem = f"takes more than {_SECONDS:g} s to match the names of the parameters"
        raise ConfigError(f"{what}: {problem}; repeat nothing that repeats, as in (a+)+") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class _OutOfTimeError(Exception):
    """The time is up."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _OutOfTimeError
