"""Whether a checkpoint is what was written: structure first, then the hash of every byte.

Needs neither torch nor a GPU. ``read_manifest`` costs milliseconds and finds what is missing,
truncated, renamed or foreign; ``hash_problems`` reads everything.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from checkpoint.errors import CheckpointError
from checkpoint.manifest import MANIFEST, SUMS, File, Manifest, own_sum, parse

_STEP = re.compile(r"step-(\d+)")
_PIECE = 1 << 20

Progress = Callable[[int], object]
"""Told how many bytes have been read since the last call."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose structure is right; data are not hashed.

    Raises:
        CheckpointError: If anything is missing, too short or long, foreign, or not its own.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint")
    content, sums = (_content(folder / name) for name in (MANIFEST, SUMS))
    if not sums.endswith(own_sum(content)):
        raise CheckpointError(f"{folder / MANIFEST}: corrupted, not what {SUMS} says")
    try:
        manifest = parse(content)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from error
    if sums != manifest.sums(content):
        raise CheckpointError(f"{folder / SUMS}: corrupted, not what {MANIFEST} says")
    _check_name(folder, manifest)
    _check_files(folder, manifest)
    return manifest


def hash_problems(
    folder: Path, files: Iterable[tuple[str, File]], progress: Progress = lambda _: None
) -> Iterator[str]:
    """Read files in several threads; yields one line for each whose bytes are others."""
    wanted = list(files)
    num_threads = max(1, min(8, len(os.sched_getaffinity(0)), len(wanted)))
    with ThreadPoolExecutor(num_threads) as pool:
        found = pool.map(lambda item: _xxh128(folder / item[0], progress), wanted)
        for (name, file), digest in zip(wanted, found, strict=True):
            if digest != file.xxh128:
                yield f"{folder / name}: corrupted, its hash is not what {MANIFEST} says"


def verify(folder: Path, progress: Progress = lambda _: None) -> Manifest:
    """The manifest of a checkpoint of which every byte is what was written.

    Raises:
        CheckpointError: Naming the first file that is wrong.
    """
    manifest = read_manifest(folder)
    for problem in hash_problems(folder, manifest.files.items(), progress):
        raise CheckpointError(problem)
    return manifest


def shares(manifest: Manifest, num_readers: int) -> list[list[tuple[str, File]]]:
    """The files that each reader hashes, largest first to whom has least."""
    parts: list[list[tuple[str, File]]] = [[] for _ in range(num_readers)]
    loads = [0] * num_readers
    for name, file in sorted(manifest.files.items(), key=lambda item: (-item[1].bytes, item[0])):
        reader = loads.index(min(loads))
        parts[reader].append((name, file))
        loads[reader] += file.bytes
    return parts


def _check_name(folder: Path, manifest: Manifest) -> None:
    """Refuse ``step-30`` that holds step 20."""
    for name in {folder.name, folder.resolve().name}:
        found = _STEP.fullmatch(name)
        if found and int(found[1]) != manifest.step:
            raise CheckpointError(f"{folder}: renamed, it holds step {manifest.step}")


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name, file in manifest.files.items():
        found = _regular_size(folder / name)
        if found != file.bytes:
            raise CheckpointError(f"{folder / name}: {found} bytes, written were {file.bytes}")
    # Dot files are the file system's own (".nfs0000..."), and no reader looks at them.
    own = {MANIFEST, SUMS, *manifest.files}
    foreign = sorted(n.name for n in folder.iterdir() if n.name not in own and n.name[0] != ".")
    if foreign:
        raise CheckpointError(f"{folder / foreign[0]}: not part of this checkpoint")


def _content(path: Path) -> bytes:
    _regular_size(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _regular_size(path: Path) -> int:
    """Size of a file that is one: a pipe would wait for ever, a link lead elsewhere."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return found.st_size


def _xxh128(path: Path, progress: Progress) -> str:
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_PIECE))
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(buffer[:size])
                progress(size)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return digest.hexdigest()
