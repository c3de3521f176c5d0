"""Search for the checkpoint to resume from: the newest one that verifies.

Only rank 0 lists the folder, since ranks can see different states of a network file system at the
same time. The ranks share the hashing of the files.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from checkpoint.errors import CheckpointError, MissingFileError, UnreadableError
from checkpoint.folders import set_aside, step_folder, steps_in
from checkpoint.manifest import Manifest
from checkpoint.ranks import from_rank_0, gathered, say
from checkpoint.verify import file_problems, read_manifest, shares

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint with every byte read and verified."""

    folder: Path
    manifest: Manifest


def verify_together(folder: Path, group: dist.ProcessGroup) -> Found:
    """Verify a checkpoint; each rank hashes its share.

    Raises:
        CheckpointError: On every rank; names the first damaged file.
        UnreadableError: On every rank, if no damage is known, but a rank cannot read a file, or
            does not see a file that another rank sees.
    """
    try:
        manifest = from_rank_0(partial(read_manifest, folder), group, folder)
    except MissingFileError as error:
        raise _agreed(error, 0, group) from error
    mine = shares(manifest, dist.get_world_size(group))[dist.get_rank(group)]
    by_rank = gathered(next(file_problems(folder, manifest, mine), None), group)
    problems = [
        _agreed(problem, rank, group) for rank, problem in enumerate(by_rank) if problem is not None
    ]
    for problem in sorted(problems, key=lambda problem: isinstance(problem, UnreadableError)):
        raise problem
    return Found(folder, manifest)


def _agreed(problem: CheckpointError, rank: int, group: dist.ProcessGroup) -> CheckpointError:
    """Common error of all ranks for a problem of one: a file is missing if no rank sees it."""
    if not isinstance(problem, MissingFileError):
        return problem
    seeing = [other for other, seen in enumerate(gathered(_is_seen(problem.path), group)) if seen]
    if not seeing:
        return problem
    return UnreadableError(f"{problem} for rank {rank}, there for rank {seeing[0]}")


def _is_seen(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
    return True


def find_step(folder: Path, step: int, group: dist.ProcessGroup, *, changes_names: bool) -> Found:
    """The checkpoint of one step; later ones are renamed, because the run repeats their steps.

    Args:
        folder: Folder of the checkpoints.
        step: Last step done in the checkpoint.
        group: All ranks.
        changes_names: True if this run may rename checkpoints, because it writes here.

    Raises:
        CheckpointError: On every rank, if there is none of that step or it is damaged.
    """
    steps = from_rank_0(partial(steps_in, folder), group, folder)
    if step not in steps:
        existing = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(
            f"checkpoint.load_step = {step}: {folder} has no complete checkpoint of that step; "
            f"there are: {existing}"
        )
    found = verify_together(step_folder(folder, step), group)
    if changes_names:
        for later in (other for other in steps if other > step):
            place = step_folder(folder, later)
            aside = from_rank_0(partial(set_aside, place, "superseded"), group, place)
            say(
                _logger,
                logging.INFO,
                "%s: later than checkpoint.load_step = %d, now %s",
                place,
                step,
                aside.name,
            )
    return found


def find_newest(
    folder: Path, group: dist.ProcessGroup, *, fallback: bool, changes_names: bool
) -> Found | None:
    """The newest checkpoint that verifies; None if there is none at all.

    Args:
        folder: Folder of the checkpoints.
        group: All ranks.
        fallback: True to use an older one if the newest is damaged.
        changes_names: True if this run may rename the ones that it rejects.

    Raises:
        CheckpointError: On every rank, if there are some but none may be used, or if the state of
            the newest one is unknown.
    """
    steps = from_rank_0(partial(steps_in, folder), group, folder)
    rejected: list[tuple[Path, str]] = []
    for step in reversed(steps):
        try:
            found = verify_together(step_folder(folder, step), group)
        except UnreadableError as error:
            place = step_folder(folder, step)
            raise CheckpointError(
                f"{error}; it may be good: make it readable, or rename {place} to go on without it"
            ) from error
        except CheckpointError as error:
            if not fallback:
                raise CheckpointError(
                    f"{error}; checkpoint.fallback = true would use an older one"
                ) from error
            rejected.append((step_folder(folder, step), str(error)))
            continue
        for place, problem in rejected:
            _reject(place, problem, group, renames=changes_names)
        return found
    if rejected:
        raise CheckpointError(
            f"{rejected[0][1]}; none of the {len(rejected)} checkpoints in {folder} is good: "
            "rename or remove them to begin at step 1"
        )
    return None


def _reject(place: Path, problem: str, group: dist.ProcessGroup, *, renames: bool) -> None:
    """Rename a damaged checkpoint and log it."""
    kept = place
    if renames:
        kept = from_rank_0(partial(set_aside, place, "bad"), group, place)
    say(_logger, logging.WARNING, "not resumed from: %s; kept as %s", problem, kept)
