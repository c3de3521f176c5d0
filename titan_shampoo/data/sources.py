"""Sources of documents: files on this machine, or a data set of the Hugging Face hub.

Every source becomes rows ``{"text": str, "held_out": bool}`` of the ``datasets`` library. About 5%
is held out for validation, independent of order, rank or run: whole files by a hash of their
relative path, rows by a hash of their text, and the end of a single text. Unreadable lines and rows
are skipped, counted and reported; too many of them are an error.
"""

import hashlib
import logging
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from titan_shampoo.data import DataError, UnreadableSampleError, printable
from titan_shampoo.data.documents import (
    HELD_OUT_ONE_IN,
    Document,
    Row,
    decoded,
    is_held_out,
    json_rows,
    table_rows,
)
from titan_shampoo.data.files import no_file, walk
from titan_shampoo.data.paths import PYTHON_STDLIB, is_folder, missing_path, nearest_path
from titan_shampoo.data.skipped import AT_LEAST, check_share

__all__ = [
    "PYTHON_STDLIB",
    "Corpus",
    "check_folder",
    "has_tables",
    "is_held_out",
    "load_hub_split",
    "local_json_lines",
    "open_corpus",
    "readable_tables",
]

_TABLES = (".parquet", ".arrow")
_TABLE_ROWS = 500
"""Number of rows read from Arrow at a time."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, and a key that changes with them."""

    rows: datasets.Dataset | datasets.IterableDataset
    identity: str


def open_corpus(source: str, *, key: str, max_bad_fraction: float = 0.0) -> Corpus:
    """The documents of ``source``; local files are not read yet.

    Args:
        source: "python_stdlib", a path of a text file, a .jsonl file (key "text") or a folder of
            such files or of parquet files (column "text"), or a hub data set as "name",
            "name:config" or "name:config:split".
        key: The TOML key that holds ``source``, for messages.
        max_bad_fraction: Largest share of unreadable lines or rows, checked when the documents are
            read.

    Raises:
        DataError: If the source does not exist; with the most similar name.
    """
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        sources = [file for file in _files_below(root)[0] if file.suffix == ".py"]
        # Its tests hold files in other encodings on purpose, so skipped files need no warning.
        return _local_corpus(root, sources, (), 0.0, skip_level=logging.DEBUG)
    problem = missing_path(source)
    if problem is not None:
        raise DataError(f'{key} = "{source}": {problem}')
    path = Path(source).expanduser()
    if path.is_file():
        return _local_corpus(path.parent, [path], (), max_bad_fraction)
    if path.is_dir() and not has_tables(path):
        return _local_corpus(path, *_files_below(path), max_bad_fraction)
    return _hub_corpus(source, key=key, max_bad_fraction=max_bad_fraction)


def has_tables(folder: Path) -> bool:
    """True if a file of Arrow tables is below ``folder``, which only ``datasets`` reads."""
    return any(
        name.endswith(_TABLES) and no_file(Path(place, name)) is None
        for place, names in walk(folder, follow=False)  # as datasets does
        for name in names
    )


def _files_below(root: Path, *, follow: bool = True) -> tuple[list[Path], tuple[str, ...]]:
    """All files below ``root`` by relative path, and descriptions of entries that are not files.

    Hidden files and installed packages are left out.

    Args:
        root: The folder.
        follow: True to follow links to folders.
    """
    files, others = [], []
    for folder, names in walk(root, without=("site-packages", "dist-packages"), follow=follow):
        for file in (Path(folder, name) for name in names):
            problem = no_file(file)
            if problem is None:
                files.append(file)
            else:
                others.append(f"{file}: {problem}")
    files.sort(key=lambda file: file.relative_to(root).as_posix())
    return files, tuple(sorted(others))


def _local_corpus(
    root: Path,
    files: list[Path],
    others: tuple[str, ...],
    max_bad_fraction: float,
    *,
    skip_level: int = logging.WARNING,
) -> Corpus:
    """The documents of ``files``, identified by path, size and change time as in ``datasets``."""
    # Part of the identity: paths below the root decide what is held out.
    digest = hashlib.sha256(os.fsencode(f"{root.resolve()}\n"))
    for file in files:
        status = file.stat()
        line = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(os.fsencode(line))
    # Unreadable files are part of the identity: once they can be read, the tokens change.
    digest.update(os.fsencode("\n".join(others)))
    rows = datasets.IterableDataset.from_generator(
        _documents,
        gen_kwargs={
            "root": root,
            "files": tuple(files),
            "others": others,
            "max_bad_fraction": max_bad_fraction,
            "skip_level": skip_level,
        },
    )
    return Corpus(rows, digest.hexdigest())


def _documents(
    root: Path,
    files: tuple[Path, ...],
    others: tuple[str, ...],
    max_bad_fraction: float,
    skip_level: int,
) -> Iterator[Document]:
    """One document per text file, one per line of a JSON-lines file."""
    _report_others(root, len(files), others, max_bad_fraction)
    skipped = []
    for file in files:
        if file.suffix == ".jsonl":
            yield from _readable(json_rows(file), file, max_bad_fraction)
        elif (text := _text_of(file, max_bad_fraction)) is None:
            skipped.append(file)
        elif len(files) == 1:
            yield from _head_and_tail(text)
        elif text:
            yield {"text": text, "held_out": is_held_out(file.relative_to(root).as_posix())}
    if skipped and len(skipped) == len(files):
        raise DataError(f"{files[0]}: not UTF-8 text, and no other file is")
    if skipped:
        message = "%s: skipped %d of %d files that are not UTF-8 text, first %s"
        first = printable(skipped[0])
        _logger.log(skip_level, message, printable(root), len(skipped), len(files), first)


def check_folder(source: str, max_bad_fraction: float) -> None:
    """Count unreadable entries of a folder that ``datasets`` reads, which does not mention them.

    Raises:
        DataError: If there are too many.
    """
    if is_folder(source):
        folder = Path(source).expanduser()
        files, others = _files_below(folder, follow=False)
        _report_others(folder, len(files), others, max_bad_fraction)


def _report_others(root: Path, num_files: int, others: Sequence[str], max_fraction: float) -> None:
    """Count unreadable entries as bad samples, beside ``num_files`` readable ones."""
    if others:
        total = num_files + len(others)
        check_share(len(others), max(total, AT_LEAST), max_fraction, others[0])
        message = "%s: skipped %d of %d files that cannot be read, first %s"
        _logger.warning(message, printable(root), len(others), total, printable(others[0]))


def _readable(rows: Iterable[Row], source: object, max_fraction: float) -> Iterator[Document]:
    """The documents among ``rows``; broken rows are counted, and reported at the end."""
    num_rows, broken = 0, []
    for row in rows:
        num_rows += 1
        if isinstance(row, UnreadableSampleError):
            broken.append(str(row))
        elif row is not None:
            yield row
    if broken:
        check_share(len(broken), num_rows, max_fraction, broken[0])
        message = "%s: skipped %d of %d rows, first %s"
        _logger.warning(message, printable(source), len(broken), num_rows, broken[0])


def _text_of(file: Path, max_bad_fraction: float) -> str | None:
    """Content of ``file`` without unreadable lines; None if there are too many of those."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    if (text := decoded(raw)) is not None:
        return text
    lines = [decoded(line) for line in raw.splitlines(keepends=True)]
    bad = [number for number, line in enumerate(lines, 1) if line is None]
    if len(bad) > max_bad_fraction * len(lines):
        return None
    message = "%s: skipped %d of %d lines that are not UTF-8 text, first line %d"
    _logger.warning(message, printable(file), len(bad), len(lines), bad[0])
    return "".join(line for line in lines if line is not None)


def _head_and_tail(text: str) -> Iterator[Document]:
    """A single text as two documents, cut at the first line that starts in its last 5%."""
    at_least = len(text) - len(text) // HELD_OUT_ONE_IN
    line_end = text.find("\n", at_least - 1, len(text) - 1)
    cut = at_least if line_end < 0 else line_end + 1
    for part, held_out in ((text[:cut], False), (text[cut:], True)):
        if part:
            yield {"text": part, "held_out": held_out}


def _hub_documents(
    rows: datasets.Dataset, source: str, max_bad_fraction: float
) -> Iterator[Document]:
    """The "text" of each row of a hub data set."""
    tables = readable_tables(rows, source)
    yield from _readable(table_rows(tables, source), source, max_bad_fraction)


def readable_tables(rows: datasets.Dataset | datasets.IterableDataset, place: str) -> Iterator[Any]:
    """The rows as Arrow tables, up to the first one that ``datasets`` cannot read.

    Raises:
        DataError: If the rest of a file cannot be read or downloaded.
    """
    num_read = 0
    try:
        for table in rows.with_format("arrow").iter(_TABLE_ROWS):
            yield table
            num_read += table.num_rows
    # Each file format and each storage raises its own errors.
    except Exception as error:
        raise DataError(
            f"{place}: cannot be read from row {num_read} on ({_first_line(error)}); repair or "
            "remove the file"
        ) from error


def _hub_corpus(source: str, *, key: str, max_bad_fraction: float) -> Corpus:
    """A data set of the hub, downloaded or from the cache of ``datasets``."""
    rows = load_hub_split(source, key=key)
    check_folder(source, max_bad_fraction)
    documents = datasets.IterableDataset.from_generator(
        _hub_documents,
        gen_kwargs={"rows": rows, "source": source, "max_bad_fraction": max_bad_fraction},
    )
    return Corpus(documents, rows._fingerprint)


def load_hub_split(source: str, *, key: str, streaming: bool = False) -> Any:  # noqa: ANN401
    """The split "name:config:split" of a data set of the hub, or of a local copy of one.

    Args:
        source: An empty config stands for the only one, an empty split for "train".
        key: The TOML key that holds ``source``, for messages.
        streaming: True to download nothing and return an ``IterableDataset``, read on iteration.

    Raises:
        DataError: If it cannot be loaded.
    """
    name, config, split = _named(source)
    problem = missing_path(name)
    if problem is None and decoded(os.fsencode(name)) is None:
        problem = "the path is not UTF-8, as the datasets library needs it; rename the folder"
    if problem is not None:
        raise DataError(f'{key} = "{source}": {problem}')
    try:
        return _load_from_hub(name, config, split, streaming)
    # The hub's client raises some twenty unrelated types.
    except Exception as error:
        if is_folder(name):
            raise DataError(
                f'{key} = "{source}": no data set there ({_first_line(error)}); it should hold '
                "parquet, JSON-lines or text files"
            ) from error
        raise DataError(
            f'{key} = "{source}": no such file or folder, and cannot be loaded as a hub data set '
            f"({_first_line(error)}){nearest_path(Path(source))}"
        ) from error


def local_json_lines(source: str) -> list[Path]:
    """Files of a split of a local folder, if all are JSON lines; else an empty list.

    ``datasets`` would give up a whole file because of one broken line.
    """
    name, config, split = _named(source)
    if not is_folder(name):
        return []
    try:
        builder = datasets.load_dataset_builder(str(Path(name).expanduser()), config or None)
    except Exception:  # ``load_hub_split`` reports it
        return []
    files = [Path(file) for file in (builder.config.data_files or {}).get(split or "train", [])]
    return files if all(file.suffix == ".jsonl" and file.is_file() for file in files) else []


def _named(source: str) -> tuple[str, str, str]:
    """Name, config and split of "name:config:split"; missing parts are empty."""
    if is_folder(source):  # its name may have colons
        return source, "", ""
    name, config, split = (*source.split(":", 2), "", "")[:3]
    return name, config, split


def _load_from_hub(name: str, config: str, split: str, streaming: bool) -> Any:  # noqa: ANN401
    """A whole split, by default "train"; a cached one needs no network."""
    arguments = (str(Path(name).expanduser()), config or None)
    options = {"split": split or "train"} | ({"streaming": True} if streaming else {})
    if is_folder(name):
        return datasets.load_dataset(*arguments, **options)
    offline = datasets.config.HF_HUB_OFFLINE
    # Without this, datasets tries an unreachable hub for 23 s, on every rank.
    datasets.config.HF_HUB_OFFLINE = offline or not _hub_answers(name)
    try:
        return datasets.load_dataset(name, config or None, **options)
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _hub_answers(name: str) -> bool:
    """True if the hub responds to a request for ``name``, even with a refusal."""
    try:
        HfApi().dataset_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # errors of its network layer, which differ between versions
        return False
    return True


def _first_line(error: BaseException) -> str:
    """Type and first line of the error, or of its cause."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
        return _first_line(error.__cause__)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
