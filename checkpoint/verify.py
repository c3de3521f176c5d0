"""Verification of a checkpoint: its structure first, then the hash of every byte.

Needs neither torch nor a GPU. ``read_manifest`` takes milliseconds and finds files that are
missing, truncated, renamed or foreign, and values that make no sense. ``file_problems`` reads
everything.
"""

import os
import platform
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import xxhash

from checkpoint.errors import CheckpointError, MissingFileError, UnreadableError
from checkpoint.folders import step_of
from checkpoint.header import Entries, entries_by_file, header_problem
from checkpoint.manifest import MANIFEST, SUMS, File, Manifest, own_sum, parse
from checkpoint.schema import problem

_PIECE = 1 << 20

_LARGEST_MANIFEST = 1 << 30
"""Largest manifest in bytes, ten times that of an 8-billion-parameter model on 1,024 ranks."""

PAUSES = (0.1, 0.4, 1.5)
"""Seconds between attempts to read: network file systems and full file tables recover."""

T = TypeVar("T")

Progress = Callable[[int], object]
"""Callback with the number of bytes read since the last call."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint with the right structure; data are not hashed.

    Raises:
        CheckpointError: If a file is missing, too short or long, foreign, or of another checkpoint.
        UnreadableError: If a file cannot be read, and may be good.
    """
    if not _patiently(folder, folder.is_dir):
        raise CheckpointError(f"{folder}: no such checkpoint")
    content, sums = (_content(folder / name) for name in (MANIFEST, SUMS))
    if not sums.endswith(own_sum(content)):
        raise CheckpointError(f"{folder / MANIFEST}: corrupted, not what {SUMS} says")
    manifest = _sensible(folder / MANIFEST, content)
    if sums != manifest.sums(content):
        raise CheckpointError(f"{folder / SUMS}: corrupted, not what {MANIFEST} says")
    _check_name(folder, manifest)
    _check_files(folder, manifest)
    return manifest


def _sensible(path: Path, content: bytes) -> Manifest:
    """The manifest with the bytes ``content``, if every value in it makes sense."""
    try:
        manifest = parse(content)
        wrong = problem(manifest)
    except RecursionError:
        wrong = "not a manifest: nested too deeply"
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if wrong is not None:
        raise CheckpointError(f"{path}: {wrong}")
    return manifest


def file_problems(
    folder: Path,
    manifest: Manifest,
    files: Iterable[tuple[str, File]] | None = None,
    progress: Progress = lambda _: None,
) -> Iterator[CheckpointError]:
    """Read files in several threads; yield the problem of each damaged one.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        files: The files to read; None for all of them.
        progress: Callback for the progress.
    """
    wanted = list(manifest.files.items() if files is None else files)
    entries = entries_by_file(manifest)
    num_threads = max(1, min(8, len(os.sched_getaffinity(0)), len(wanted)))
    with ThreadPoolExecutor(num_threads) as pool:
        found = pool.map(
            lambda item: _file_problem(folder / item[0], item[1], entries[item[0]], progress),
            wanted,
        )
        yield from filter(None, found)


def verify(folder: Path, progress: Progress = lambda _: None) -> Manifest:
    """The manifest of a checkpoint, after every byte is verified.

    Raises:
        CheckpointError: With the first damaged file.
        UnreadableError: With the first file that cannot be read, and may be good.
    """
    manifest = read_manifest(folder)
    for found in file_problems(folder, manifest, progress=progress):
        raise found
    return manifest


def shares(manifest: Manifest, num_readers: int) -> list[list[tuple[str, File]]]:
    """The files that each reader hashes; the largest go first, to the reader with the least."""
    parts: list[list[tuple[str, File]]] = [[] for _ in range(num_readers)]
    loads = [0] * num_readers
    for name, file in sorted(manifest.files.items(), key=lambda item: (-item[1].bytes, item[0])):
        reader = loads.index(min(loads))
        parts[reader].append((name, file))
        loads[reader] += file.bytes
    return parts


def _check_name(folder: Path, manifest: Manifest) -> None:
    """Refuse a ``step-30`` that holds step 20."""
    for name in {folder.name, folder.resolve().name}:
        if step_of(name) not in (None, manifest.step):
            raise CheckpointError(f"{folder}: renamed, it holds step {manifest.step}")


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name, file in manifest.files.items():
        found = _regular_size(folder / name)
        if found != file.bytes:
            raise CheckpointError(f"{folder / name}: {found} bytes, wanted {file.bytes}")
    # Dot files belong to the file system (".nfs0000..."), and no reader opens them.
    own = {MANIFEST, SUMS, *manifest.files}
    names = _patiently(folder, partial(os.listdir, folder))
    foreign = sorted(name for name in names if name not in own and name[0] != ".")
    if foreign:
        raise CheckpointError(f"{folder / foreign[0]}: not part of this checkpoint")


def _content(path: Path) -> bytes:
    size = _regular_size(path)
    if size > _LARGEST_MANIFEST:
        raise CheckpointError(f"{path}: {size} bytes, wanted at most {_LARGEST_MANIFEST}")
    return _patiently(path, path.read_bytes)


def _regular_size(path: Path) -> int:
    """Size of a regular file; a pipe would block, and a link could lead elsewhere."""
    found = _patiently(path, path.lstat)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return found.st_size


def _file_problem(
    path: Path, file: File, entries: Entries, progress: Progress
) -> CheckpointError | None:
    try:
        digest = _patiently(path, partial(_xxh128, path, progress))
        if digest != file.xxh128:
            return CheckpointError(f"{path}: corrupted, its hash is not what {MANIFEST} says")
        wrong = _patiently(path, partial(header_problem, path, entries))
    except CheckpointError as error:
        return error
    return None if wrong is None else CheckpointError(f"{path}: {wrong}")


def _xxh128(path: Path, progress: Progress) -> str:
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_PIECE))
    total = 0
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(buffer[:size])
                progress(size)
                total += size
    except OSError:
        progress(-total)  # it is read again from the start
        raise
    return digest.hexdigest()


def _patiently(path: Path, read: Callable[[], T]) -> T:
    """Result of ``read``, with retries while the file system fails.

    Raises:
        MissingFileError: If the file is missing, and does not appear.
        UnreadableError: If it cannot be read for another reason.
    """
    for pause in PAUSES:
        try:
            return read()
        except OSError:
            time.sleep(pause)
    try:
        return read()
    except FileNotFoundError:
        raise MissingFileError(str(path)) from None
    except OSError as error:
        reason = f"{path}: cannot be read on {platform.node()}: {error.strerror}"
        raise UnreadableError(reason) from error
