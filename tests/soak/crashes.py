"""Kill a save at every file-system event: ``python -m tests.soak.crashes``.

A child process saves step 3 while steps 1 and 2 are there, keeps the newest two, and exports; an
audit hook counts what it does to the file system and kills it at the n-th event, for every n.
"""

import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from checkpoint.folders import step_folder, steps_in, sweep
from checkpoint.hugging_face import export_weights
from checkpoint.manifest import Manifest
from checkpoint.native import alone
from checkpoint.reader import whole_tensors
from checkpoint.record import describe_run
from checkpoint.retention import Retention
from checkpoint.verify import verify
from checkpoint.writer import Writer

_CHANGES = (
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.unlink", "os.truncate",
    "os.link", "os.symlink", "shutil.rmtree",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What was found after a child had been killed at one event."""

    event: int
    steps: tuple[int, ...]
    acknowledged: int
    problem: str


def _content(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"model.w{n}.weight": torch.randn(40, 30, generator=generator) for n in range(3)}


def save(folder: Path, step: int) -> None:
    writer = Writer(step_folder(folder, step), describe_run(step, "crash", "model"))
    with alone():
        dcp.save(_content(step), storage_writer=writer, no_dist=True)


def work(folder: Path, acknowledge: Any) -> None:
    """Save a step, keep two, export, as a run does at its end."""
    save(folder, 3)
    acknowledge()
    retention = Retention(folder, keep=2)
    retention.trust(3)
    retention.apply()
    weights = ((key.removeprefix("model."), value) for key, value in _content(3).items())
    export_weights(weights, folder / "hf-step-3", None)


def crash_points(folder: Path) -> list[Outcome]:
    """The outcome of dying at each event, in order; the last one is that of not dying."""
    outcomes: list[Outcome] = []
    while not outcomes or outcomes[-1].event >= 0:
        place = folder / f"at-{len(outcomes)}"
        for step in (1, 2):
            save(place, step)
        outcomes.append(_die_at(len(outcomes), place))
        shutil.rmtree(place)
    return outcomes


def _die_at(event: int, place: Path) -> Outcome:
    pid = os.fork()
    if pid == 0:
        _child(event, place)
    _, status = os.waitpid(pid, 0)
    survived = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    if not survived and not os.WIFSIGNALED(status):
        return Outcome(event, (), 0, f"the child failed with status {status}")
    acknowledged = 3 if (place / "acknowledged").exists() else 2
    (place / "acknowledged").unlink(missing_ok=True)
    return Outcome(-1 if survived else event, *_look(place, acknowledged))


def _child(event: int, place: Path) -> None:
    seen = 0

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if name not in _CHANGES or (name == "open" and not _writes(args)):
            return
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    def acknowledge() -> None:
        # Not an event of the save: whatever happens after this line may not lose step 3.
        (place / "acknowledged").symlink_to("/")

    sys.addaudithook(hook)
    try:
        work(place, acknowledge)
    except BaseException:
        os._exit(1)
    os._exit(0)


def _writes(args: tuple[Any, ...]) -> bool:
    path, _, flags = args
    is_own = isinstance(path, (str, os.PathLike)) and "/at-" in os.fspath(path)
    return is_own and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _look(place: Path, acknowledged: int) -> tuple[tuple[int, ...], int, str]:
    """What a restarted run finds, and whether it may be so."""
    sweep(place)
    steps = steps_in(place)
    found: Manifest | None = None
    for step in steps:
        folder = step_folder(place, step)
        found = verify(folder)
        for key, value in whole_tensors(folder, found, found.tensors):
            if not torch.equal(value, _content(step)[key]):
                return tuple(steps), acknowledged, f"step {step}: {key} has other values"
    left = [p.name for p in place.iterdir() if "." in p.name and p.name != ".lock"]
    if left:
        return tuple(steps), acknowledged, f"left behind: {left}"
    if not steps or max(steps) < acknowledged or len(steps) < 2:
        return tuple(steps), acknowledged, "an acknowledged checkpoint is lost"
    return tuple(steps), acknowledged, ""


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        found = crash_points(Path(temporary))
    for outcome in found:
        print(outcome)
    bad = [outcome for outcome in found if outcome.problem]
    print(f"{len(found) - 1} crash points, {len(bad)} lost or broken")
