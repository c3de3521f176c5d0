"""Where documents come from: files on this machine or a data set of the Hugging Face hub.

Every source becomes rows ``{"text": str, "held_out": bool}`` of the ``datasets`` library. About 5%
is held out for validation, and what is held out never depends on order, rank or run: whole files by
a hash of their relative path, rows by a hash of their text, the end of a text that is alone. Lines
and rows that cannot be read are skipped, counted and reported, unless they are too many.
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
"""Rows that are taken from Arrow at a time."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, and a key that changes whenever they do."""

    rows: datasets.Dataset | datasets.IterableDataset
    identity: str


def open_corpus(source: str, *, key: str, max_bad_fraction: float = 0.0) -> Corpus:
    """The documents of ``source``; reads nothing yet of those that lie on this machine.

    Args:
        source: "python_stdlib", a path of a text file, a .jsonl file (key "text") or a folder of
            such files or of parquet files (column "text"), or a hub data set as "name",
            "name:config" or "name:config:split".
        key: The TOML key that holds ``source``, for messages.
        max_bad_fraction: Share of the lines or rows that may be unreadable; more of them are
            refused when the documents are read.

    Raises:
        DataError: If there is no such thing, with the nearest name that exists.
    """
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        sources = [file for file in _files_below(root)[0] if file.suffix == ".py"]
        # Its tests hold files in other encodings on purpose: nothing to warn about.
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
    """True if a file of Arrow tables is below ``folder``: only ``datasets`` reads those."""
    return any(
        name.endswith(_TABLES) and no_file(Path(place, name)) is None
        for place, names in walk(folder, follow=False)  # as datasets does
        for name in names
    )


def _files_below(root: Path, *, follow: bool = True) -> tuple[list[Path], tuple[str, ...]]:
    """All files below ``root`` by relative path, and what else is there instead of one.

    Hidden files and installed packages are left out.

    Args:
        root: The folder.
        follow: Whether links to folders are followed.
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
    """The documents of ``files``, known by path, size and time of change as in ``datasets``."""
    # The root belongs to it: what is held out goes by the path below it.
    digest = hashlib.sha256(os.fsencode(f"{root.resolve()}\n"))
    for file in files:
        status = file.stat()
        line = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(os.fsencode(line))
    # Files that could not be read: once they can, the tokens are others.
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
        raise DataError(f"{files[0]}: not UTF-8 text, nor is any other file given")
    if skipped:
        message = "%s: skipped %d of %d files that are not UTF-8 text, first %s"
        first = printable(skipped[0])
        _logger.log(skip_level, message, printable(root), len(skipped), len(files), first)


def check_folder(source: str, max_bad_fraction: float) -> None:
    """Count what is no file in a folder that ``datasets`` reads, which it does not mention.

    Raises:
        DataError: If there is too much.
    """
    if is_folder(source):
        folder = Path(source).expanduser()
        files, others = _files_below(folder, follow=False)
        _report_others(folder, len(files), others, max_bad_fraction)


def _report_others(root: Path, num_files: int, others: Sequence[str], max_fraction: float) -> None:
    """Count what is no file, beside ``num_files`` that are, as bad samples."""
    if others:
        total = num_files + len(others)
        check_share(len(others), max(total, AT_LEAST), max_fraction, others[0])
        message = "%s: skipped %d of %d files that cannot be read, first %s"
        _logger.warning(message, printable(root), len(others), total, printable(others[0]))


def _readable(rows: Iterable[Row], source: object, max_fraction: float) -> Iterator[Document]:
    """The documents among ``rows``; those that are broken are counted, and reported at the end."""
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
    """Content of ``file`` without lines that are no text, or None if too many are not."""
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
    """A single text in two documents, cut at the first line that starts in its last 5%."""
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
    """The rows as Arrow tables, as long as ``datasets`` can read them.

    Raises:
        DataError: If the rest of a file cannot be read, or no longer be downloaded.
    """
    num_read = 0
    try:
        for table in rows.with_format("arrow").iter(_TABLE_ROWS):
            yield table
            num_read += table.num_rows
    # Each format and each store has errors of its own.
    except Exception as error:
        raise DataError(
            f"{place}: cannot be read from row {num_read} on ({_first_line(error)}); mend or "
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
        source: An empty config means the only one, an empty split "train".
        key: The TOML key that holds ``source``, for messages.
        streaming: Download nothing: an ``IterableDataset`` that reads while it is iterated over.

    Raises:
        DataError: If it cannot be had.
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
            f'{key} = "{source}": no such file or folder, and not to be had as a hub data set '
            f"({_first_line(error)}){nearest_path(Path(source))}"
        ) from error


def local_json_lines(source: str) -> list[Path]:
    """Files of a split of a local folder, if all are JSON lines; else none.

    ``datasets`` gives up a whole file for one line that it cannot parse.
    """
    name, config, split = _named(source)
    if not is_folder(name):
        return []
    try:
        builder = datasets.load_dataset_builder(str(Path(name).expanduser()), config or None)
    except Exception:  # whatever it is, ``load_hub_split`` says it
        return []
    files = [Path(file) for file in (builder.config.data_files or {}).get(split or "train", [])]
    return files if all(file.suffix == ".jsonl" and file.is_file() for file in files) else []


def _named(source: str) -> tuple[str, str, str]:
    """Name, config and split of "name:config:split"; those that are left out are empty."""
    if is_folder(source):  # which may have colons in its name
        return source, "", ""
    name, config, split = (*source.split(":", 2), "", "")[:3]
    return name, config, split


def _load_from_hub(name: str, config: str, split: str, streaming: bool) -> Any:  # noqa: ANN401
    """A whole split, by default "train"; what was downloaded before needs no network."""
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
    """Whether the hub can be asked for ``name`` at all, if only to refuse."""
    try:
        HfApi().dataset_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # its network layer's own errors, which differ between versions
        return False
    return True


def _first_line(error: BaseException) -> str:
    """The type and the first line of the message of the error, or of what it hides."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
        return _first_line(error.__cause__)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
