"""Console output of a run: its own lines, and warnings with their rank.

torchtitan logs some forty lines per rank through the root logger, which are of no use in a run
without errors. Warnings from all sources are shown, except a few about missing hardware.
"""

import io
import logging
import os
import sys
import threading
import warnings

import torch.distributed as dist

_OURS = ("titan_shampoo", "parallel", "checkpoint", "train")

# Each is about a feature of torchtitan that this project does not show (utilisation of a GPU's
# peak, its launch script), a default that only nccl reads, a failed attempt to read a checkpoint
# that is raised later, or a fact that learning_rates.py reports with its keys.
_ABOUT_NOTHING = (
    "Peak flops undefined for",
    "Error running lspci",
    "Pipeline Parallel loss is not visible",
    "ENV[TORCH_NCCL_ASYNC_ERROR_HANDLING]",
    "Global metadata is not found",
    "Rank local metadata is not found",
    "Warmup steps (",
)

# Weights are drawn by titan_shampoo.titan.initialization. Process groups without a timeout are
# torchtitan's fake ones for axes of size 1. Autocast ignores float32.
_WARNINGS_ABOUT_NOTHING = (
    "DTensor random operators may not have complete support on cpu",
    r"DTensor manual_seed\(\) may not have complete support on cpu",
    "In CPU autocast, but the target dtype is not supported",
    "Set timeout is now only supported for either nccl or gloo",
)


def log_plainly() -> None:
    """Send this process's log to standard output as plain lines; the second call does nothing."""
    root = logging.getLogger()
    if any(isinstance(handler, _Console) for handler in root.handlers):
        return
    root.handlers.clear()
    root.setLevel(logging.INFO)
    root.addHandler(_Console())
    threading.excepthook = _thread_failed
    for message in _WARNINGS_ABOUT_NOTHING:
        warnings.filterwarnings("ignore", message)


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """Log in one line that a thread, such as TensorBoard's, cannot reach its file."""
    error = args.exc_value
    if isinstance(error, OSError) and error.filename:
        logging.getLogger(__name__).warning("%s: %s", os.fsdecode(error.filename), error.strerror)
    else:
        threading.__excepthook__(args)


class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """Standard output for human readers."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
        super().__init__(sys.stdout)
        self.addFilter(_is_worth_reading)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's)
        """Be silent after standard output is closed: a closed terminal, a pipe without a reader."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the message; a warning with its level, and with its rank if that is not 0."""
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        if record.levelno < logging.WARNING:
            return message
        rank = dist.get_rank() if dist.is_initialized() else 0
        return f"{record.levelname.lower()}{f' (rank {rank})' if rank else ''}: {message}"


def _is_worth_reading(record: logging.LogRecord) -> bool:
    if record.levelno < logging.WARNING:
        return record.name.split(".")[0] in _OURS
    return not any(text in record.getMessage() for text in _ABOUT_NOTHING)
