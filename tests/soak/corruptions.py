"""Damage checkpoints at random and see whether it is found: ``python -m tests.soak.corruptions``.

Each trial damages a fresh copy of a checkpoint in one of the ways of ``DAMAGES`` and verifies it.
"""

import argparse
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import checkpoint.verify
from checkpoint.errors import CheckpointError
from checkpoint.verify import verify
from tests.support.checkpoint_runs import run_in
from tests.support.ranks import run_on_ranks

Damage = Callable[[Path, Path, random.Random], Path]


def _file(folder: Path, draw: random.Random, pattern: str = "*") -> Path:
    return draw.choice(sorted(folder.glob(pattern)))


def flip(folder: Path, _: Path, draw: random.Random) -> Path:
    """One bit anywhere in any file."""
    path = _file(folder, draw)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return path


def truncate(folder: Path, _: Path, draw: random.Random) -> Path:
    path = _file(folder, draw)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    return path


def lengthen(folder: Path, _: Path, draw: random.Random) -> Path:
    path = _file(folder, draw)
    with path.open("ab") as file:
        file.write(bytes(draw.randint(1, 100)))
    return path


def zero_page(folder: Path, _: Path, draw: random.Random) -> Path:
    """A page of zeros, as a file system leaves after a power failure."""
    path = _file(folder, draw, "*.safetensors")
    content = bytearray(path.read_bytes())
    start = draw.randrange(0, len(content), 512)
    page = content[start : start + 512]
    content[start : start + 512] = bytes(len(page)) if any(page) else b"\1" * len(page)
    path.write_bytes(content)
    return path


def delete(folder: Path, _: Path, draw: random.Random) -> Path:
    path = _file(folder, draw)
    path.unlink()
    return path


def swap_steps(folder: Path, other: Path, draw: random.Random) -> Path:
    """A file of another step of the same run."""
    path = _file(folder, draw)
    shutil.copy(other / path.name, path)
    return path


def swap_ranks(folder: Path, _: Path, draw: random.Random) -> Path:
    first, second = draw.sample(sorted(folder.glob("*.safetensors")), 2)
    kept = folder / ".kept"
    first.rename(kept)
    second.rename(first)
    kept.rename(second)
    return first


def add_foreign(folder: Path, other: Path, draw: random.Random) -> Path:
    path = folder / draw.choice(["rank-00007.safetensors", "manifest.json.tmp", "notes"])
    shutil.copy(other / "rank-00000.safetensors", path)
    return path


def rename_folder(folder: Path, _: Path, draw: random.Random) -> Path:
    renamed = folder.with_name(f"step-{draw.randint(100, 999)}")
    folder.rename(renamed)
    return renamed


def leave_temporary(folder: Path, _: Path, draw: random.Random) -> Path:
    """A temporary folder of a dead run that somebody gave the name of a checkpoint."""
    (folder / "manifest.json").unlink()
    (folder / "XXH128SUMS").unlink()
    return folder


def make_link(folder: Path, other: Path, draw: random.Random) -> Path:
    path = _file(folder, draw)
    path.unlink()
    path.symlink_to(other / path.name)
    return path


DAMAGES: tuple[Damage, ...] = (
    flip, flip, flip, truncate, lengthen, zero_page, delete, swap_steps, swap_ranks, add_foreign,
    rename_folder, leave_temporary, make_link,
)  # fmt: skip


def _names(damage: Damage, path: Path) -> list[Path]:
    """What a refusal may name: the file, or another that contradicts it."""
    witnesses = [path.parent / name for name in ("manifest.json", "XXH128SUMS")]
    if damage is swap_ranks:
        return sorted(path.parent.glob("*.safetensors"))
    return witnesses if path in witnesses else [path]


def save_two_steps(folder: Path) -> None:
    with run_in(folder, "fsdp2") as run:
        run.manager.load()
        run.train(2)


def count_undetected(count: int, folder: Path, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Trials by kind of damage, and what was not refused or not named."""
    run_on_ranks(2, save_two_steps, folder)
    good = folder / "checkpoint"
    draw = random.Random(seed)
    kinds: Counter[str] = Counter()
    missed = []
    for trial in range(count):
        copy = folder / "copy" / "step-2"
        shutil.rmtree(copy.parent, ignore_errors=True)
        shutil.copytree(good / "step-2", copy)
        damage = DAMAGES[trial % len(DAMAGES)]
        kinds[damage.__name__] += 1
        path = damage(copy, good / "step-1", draw)
        place = path if path.name.startswith("step-") else copy
        try:
            with patch.object(checkpoint.verify, "PAUSES", ()):  # nothing will appear
                verify(place)
        except CheckpointError as error:
            if not any(str(name) in str(error) for name in _names(damage, path)):
                missed.append(f"{damage.__name__} {trial}: {error}")
        else:
            missed.append(f"{damage.__name__} {trial}: accepted")
    return kinds, missed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        kinds, missed = count_undetected(options.trials, Path(temporary), options.seed)
    for kind, number in kinds.most_common():
        print(f"{kind:16} {number:5}")
    print("\n".join(missed))
    print(f"{options.trials} corruptions, {options.trials - len(missed)} refused by name")
