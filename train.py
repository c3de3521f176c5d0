"""One run: settings -> recipe -> trainer -> training.

    torchrun --nproc_per_node=2 train.py --job.config_file configs/transformer_debug.toml

``--plan --world-size N`` prints the needs of such a run on every rank, and starts nothing. Without
torchrun there is one rank. A mistake in the settings ends every rank with exit code 2 and one line.
Signals are described in ``titan_shampoo.stopping``.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from titan_shampoo.config import (
    ConfigError,
    check_dump_folder,
    check_launch,
    check_world,
    read_config,
    read_plan_request,
    started_ranks,
)
from titan_shampoo.config.errors import one_line
from titan_shampoo.data import DataError
from titan_shampoo.extras import end_without
from titan_shampoo.stopping import end_at_once

_ONE_RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
}


def main(args: list[str], started_with: dict[str, str]) -> None:
    """Train, or plan, as the command line says.

    Args:
        args: The command line without the program's name.
        started_with: The environment at the start.

    Raises:
        ConfigError: If settings are wrong; if possible before torch is imported.
        DataError: If data, tokenizer or checkpoints cannot be used.
    """
    check_launch(started_with)
    started = started_ranks(started_with)
    request, args = read_plan_request(args, started)
    settings = read_config(args)
    check_world(settings, request.world_size if request else started)
    if not request:
        check_dump_folder(settings)

    if os.environ["RANK"] == "0":
        for note in settings.notes:
            sys.stderr.write(f"{note}\n")

    from checkpoint import CheckpointManager  # noqa: PLC0415 (imports torch)
    from parallel.recipes import recipe_of  # noqa: PLC0415
    from titan_shampoo import titan  # noqa: PLC0415
    from titan_shampoo.titan.config import make_job_config  # noqa: PLC0415

    titan.log_plainly()
    job_config = make_job_config(settings)
    recipe = recipe_of(job_config.model.name)
    if request:
        plan = titan.plan_run(job_config, recipe, request.world_size)
        sys.stdout.write(f"{json.dumps(plan.as_json()) if request.as_json else plan}\n")
        return
    titan.Trainer(job_config, recipe, CheckpointManager).run()


def end_with(mistake: Exception) -> NoReturn:
    """Report the mistake, once per machine, and exit with code 2."""
    recorded = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if recorded:  # torchtitan wrote a traceback there, which torchrun would print
        Path(recorded).unlink(missing_ok=True)
    # torchrun terminates all ranks when one exits. The others leave rank 0 time to report, and
    # report themselves if the mistake is theirs alone.
    is_first = os.environ["LOCAL_RANK"] == "0"
    if is_first:
        _say(mistake)
    if "titan_shampoo.titan" in sys.modules:
        sys.modules["titan_shampoo.titan"].wait_for_others()
    if not is_first:
        time.sleep(8)
        _say(mistake)
    # Not sys.exit: that would wait for messages that other ranks never send.
    os._exit(2)


def was_stopped(error: Exception) -> bool:
    """True if ``error`` only follows from the end of another rank; it is then reported in one line.

    The rank that ended first has the cause, and torchrun's agent ends the others within a second:
    before the first step at once, later by a request to stop, which such a rank cannot fulfil.
    """
    signals = sys.modules.get("checkpoint.signals")
    deadline = time.monotonic() + (3 if os.environ["WORLD_SIZE"] != "1" else 0)
    while not (asked := signals is not None and signals.StopRequest.any_received):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    lines = str(error).strip().splitlines() or ["no reason given"]
    problem = f"{type(error).__name__}: {lines[0]}"
    _say(f"rank {os.environ['RANK']}: asked to stop, and could not finish the step: {problem}")
    return asked


def _say(message: object) -> None:
    with suppress(OSError):  # the reader may be gone
        sys.stdout.flush()
    with suppress(OSError):
        sys.stderr.write(f"{one_line(str(message))}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    end_at_once()
    end_without("train.py")
    given = dict(os.environ)
    for name, value in _ONE_RANK.items():
        os.environ.setdefault(name, value)
    try:
        main(sys.argv[1:], given)
    except (ConfigError, DataError) as mistake:
        end_with(mistake)
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # a fault of the machine
            end_with(ConfigError(f"{os.fsdecode(error.filename)}: {error.strerror}"))
        if not was_stopped(error):
            raise
        os._exit(1)
    try:
        sys.stdout.flush()
    except OSError:  # the reader is gone; Python would turn that into the exit code
        os._exit(0)
