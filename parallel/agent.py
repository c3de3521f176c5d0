"""torchrun's agent, with the signals and the exit codes of ``parallel.launch``."""

import logging
import signal
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic import multiprocessing
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from titan_shampoo.stopping import STOP_SIGNALS

if TYPE_CHECKING:  # launch.py runs under the name of __main__
    from parallel.launch import Stop

EXPLAINED = 2
"""Exit code of a rank that has reported its error."""

_NOTHING_SAVED = "nothing was saved, as no step was done, or checkpoint.enable is false"


def run_ranks(args: list[str], stop: "Stop") -> int:
    """Run ``args`` like torchrun, and return the exit code.

    Raises:
        ChildFailedError: torchrun's report of a failure that no rank has reported.
    """
    logging.getLogger(api.__name__).addFilter(lambda record: not stop.received and _is_news(record))

    class Ranks(multiprocessing.SubprocessContext):
        """The ranks of this machine, to which signals are forwarded."""

        def _start(self) -> None:
            # torchrun's handlers, installed just before, would raise inside its agent.
            stop.begin()
            stop.listen()
            super()._start()  # type: ignore[no-untyped-call]
            stop.watch([*self.pids().values()])

        def wait(self, timeout: float = -1, period: float = 1) -> Any:  # noqa: ANN401 (torch's)
            """Check which ranks have ended; stopped ones are not restarted."""
            result = super().wait(timeout, period)
            if stop.received and result is not None and result.is_failed():
                raise SystemExit(_code_after_stop(stop, result.failures))
            return result

    multiprocessing.SubprocessContext = Ranks  # type: ignore[misc]
    try:
        run(parse_args(args))
    except api.SignalException as error:  # a signal before our handlers were installed
        return stop.leave(error.sigval, _NOTHING_SAVED)
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: _order(item[1]))
        code = failure.exitcode
        if code == EXPLAINED:
            return EXPLAINED
        if -code in STOP_SIGNALS:
            return stop.leave(-code, f"sent to rank {rank}; {_NOTHING_SAVED}")
        raise
    return 0


def _code_after_stop(stop: "Stop", failures: Any) -> int:  # noqa: ANN401 (torch's)
    """Exit code of a run that was asked to stop and did not end well."""
    assert stop.received
    codes = [failure.exitcode for failure in failures.values()]
    if all(code > 0 for code in codes):  # the ranks have reported the reason
        return EXPLAINED if EXPLAINED in codes else int(codes[0])
    if stop.received == signal.SIGQUIT:
        return stop.leave(stop.received, "at once, without saving")
    return stop.leave(stop.received, _NOTHING_SAVED)


def _order(failure: Any) -> tuple[bool, float]:  # noqa: ANN401 (torch's)
    """Sort key that puts the first failure first: the agent ends other ranks within a second."""
    return failure.exitcode == -signal.SIGTERM, failure.timestamp


def _is_news(record: logging.LogRecord) -> bool:
    """True if a line of torchrun's log says more than that ranks have ended."""
    message = record.getMessage()
    codes = [EXPLAINED, *(-number for number in STOP_SIGNALS)]
    ended = any(f"exitcode: {code})" in message for code in codes)
    return not ended and "closing signal" not in message
