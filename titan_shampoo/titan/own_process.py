"""Function calls in a separate process, which leave no state behind."""

import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from titan_shampoo.stopping import end_with_parent


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 (any function)
    """Return the result of ``function(*args)`` in a fork of this process.

    DTensor caches results together with their meshes, and keeps them after a process group is
    destroyed: a second one in the same process would find groups that no longer exist.

    Args:
        function: Its result and its exceptions must be picklable; its warnings are not shown.
        args: Arguments of the function.

    Raises:
        RuntimeError: If the process died without an exception.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args))
    with warnings.catch_warnings():
        # Python warns of forks in a process with threads; the fork starts none and waits for none.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"planning died with exit code {process.exitcode}") from None
    process.join()
    if error is not None:
        raise error
    return result


def _call(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    end_with_parent()
    torch.set_num_threads(1)  # the parent's threads do not exist here
    warnings.simplefilter("ignore")
    result: tuple[Any, Exception | None]
    try:
        result = (function(*args), None)
    except Exception as error:  # raised again in the parent
        error.add_note(traceback.format_exc())
        result = (None, error)
    sender.send(result)
