"""Which checkpoint a run resumes from: the newest one that verifies.

Rank 0 alone looks at the folder, since network file systems do not look the same to all ranks at
once; the ranks share the hashing of what it finds.
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
    """A checkpoint every byte of which has been read and is right."""

    folder: Path
    manifest: Manifest


def verify_together(folder: Path, group: dist.ProcessGroup) -> Found:
    """Verify a checkpoint; each rank hashes its share.

    Raises:
        CheckpointError: On every rank, naming the first file that is wrong.
        UnreadableError: On every rank, if nothing is known to be wrong, but a rank cannot read a
            file, or does not see one that another sees.
    """
    try:
        manifest = from_rank_0(partial(read_manifest, folder), group, folder)
    except MissingFileError as error:
        raise _agreed(error, 0, group) from error
    mine = shares(manifest, dist.get_world_size(group))[dist.get_rank(group)]
    told = gathered(next(file_problems(folder, manifest, mine), None), group)
    problems = [
        _agreed(problem, rank, group) for rank, problem in enumerate(told) if problem is not None
    ]
    for problem in sorted(problems, key=lambda problem: isinstance(problem, UnreadableError)):
        raise problem
    return Found(folder, manifest)


def _agreed(problem: CheckpointError, rank: int, group: dist.ProcessGroup) -> CheckpointError:
    """What all ranks say to a problem of one: a file is missing if none of them sees it."""
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
    """The checkpoint of one step; later ones are set aside, for the run starts there anew.

    Args:
        folder: Where checkpoints lie.
        step: The last step done in it.
        group: All ranks.
        changes_names: Whether this run may rename checkpoints, since it writes here.

    Raises:
        CheckpointError: On every rank, if there is none of that step or it is not good.
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
    """The newest checkpoint that verifies, or None if there is none at all.

    Args:
        folder: Where checkpoints lie.
        group: All ranks.
        fallback: Whether an older one may be used if the newest is not good.
        changes_names: Whether this run may rename what it rejects.

    Raises:
        CheckpointError: On every rank, if there are some and none may be used, or it is not known
            whether the newest one may.
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
    """Take a bad checkpoint out of the way, and say so."""
    kept = place
    if renames:
        kept = from_rank_0(partial(set_aside, place, "bad"), group, place)
    say(_logger, logging.WARNING, "not resumed from: %s; kept as %s", problem, kept)
