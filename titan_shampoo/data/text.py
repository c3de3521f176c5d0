"""Language modelling on windows of a token stream that is tokenised once per machine.

All documents of a corpus are tokenised in order into one file of integers beside the caches of
``datasets``, under a file lock: the first process on the machine does the work, the others wait,
then all map the same pages. Window ``i`` is tokens ``[i * seq_len, (i + 1) * seq_len]``. Neighbours
share one token, so that every token but the first is predicted exactly once.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO, Literal

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from titan_shampoo.data import DataError
from titan_shampoo.data.sources import Corpus, open_corpus
from titan_shampoo.data.tokenizer import Tokenizer

__all__ = ["Part", "TextDataset"]

Part = Literal["train", "validation", "all"]
"""95% of the documents, the 5% held out, or both."""

_FORMAT = 2
"""Part of the cache key; raise it if equal sources shall give other tokens."""


class TextDataset:
    """(input, labels) pairs of ``seq_len`` tokens each; labels are the next tokens of the input."""

    def __init__(
        self,
        source: str,
        *,
        tokenizer: Tokenizer,
        seq_len: int,
        part: Part = "train",
        key: str = "training.dataset",
        max_bad_fraction: float = 0.0,
    ) -> None:
        """Open ``source``; tokenise it unless a process on this machine has done so before.

        Args:
            source: As in ``open_corpus``.
            tokenizer: Called once per document.
            seq_len: Tokens per sample.
            part: Documents to read; "train" and "validation" never overlap.
            key: The TOML key that holds ``source``, for messages.
            max_bad_fraction: Largest share of unreadable lines or rows.

        Raises:
            DataError: If the source cannot be read or holds less than one window.
        """
        self._source = source
        self._part = part
        self._key = key
        self._seq_len = seq_len
        self._dtype = np.min_scalar_type(tokenizer.get_vocab_size() - 1)  # uint8, uint16 or uint32
        folder = _cache_folder()  # first: datasets itself writes beside it
        corpus = open_corpus(source, key=key, max_bad_fraction=max_bad_fraction)
        self._path = _token_file(folder, corpus, tokenizer, part, self._dtype, max_bad_fraction)
        self.num_tokens = self._path.stat().st_size // self._dtype.itemsize
        self._tokens: NDArray[Any] | None = None
        if len(self) < 1:
            raise DataError(self.shortage(1))

    def __len__(self) -> int:
        """The number of windows."""
        return max(self.num_tokens - 1, 0) // self._seq_len

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Input and labels, int64 ``(seq_len,)`` each."""
        if self._tokens is None:
            self._tokens = np.memmap(self._path, dtype=self._dtype, mode="r")
        first = index * self._seq_len
        window = torch.from_numpy(self._tokens[first : first + self._seq_len + 1].astype(np.int64))
        return window[:-1], window[1:]

    def __getstate__(self) -> dict[str, Any]:
        """All but the mapped tokens, which pickle would copy; a worker maps them itself."""
        return {**self.__dict__, "_tokens": None}

    def shortage(self, num_needed: int) -> str:
        """Error message for a run that needs at least ``num_needed`` windows."""
        table = "validation" if self._part == "validation" else self._key.partition(".")[0]
        held_out = " (the part held out for validation)" if self._part == "validation" else ""
        return (
            f'{self._key} = "{self._source}"{held_out} has {self.num_tokens} tokens, '
            f"{num_needed * self._seq_len + 1} are needed for {num_needed} x {self._seq_len} "
            f"predictions; set {table}.dataset to more text, or lower {table}.seq_len or "
            f"{table}.local_batch_size"
        )


def _cache_folder() -> Path:
    """The folder of all token files, created if missing."""
    folder = Path(datasets.config.HF_DATASETS_CACHE, "titan_shampoo")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cache_error(folder, error) from error
    return folder


def _token_file(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    part: Part,
    dtype: np.dtype[Any],
    max_bad_fraction: float,
) -> Path:
    """The file of this corpus's tokens, written now unless a process has done so before."""
    key = (_FORMAT, corpus.identity, max_bad_fraction, Hasher.hash(tokenizer), part, dtype.name)
    name = hashlib.sha256(repr(key).encode()).hexdigest()
    path = folder / f"{name}.{dtype.name}"
    if path.exists():
        return path
    try:
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _write_tokens(path, corpus, tokenizer, part, dtype)
    except OSError as error:
        raise _cache_error(folder, error) from error
    return path


def _cache_error(folder: Path, error: OSError) -> DataError:
    """Error for a cache folder that cannot be written."""
    return DataError(
        f"{folder}: cannot hold the tokens: {error.strerror}; set the environment variable "
        "HF_DATASETS_CACHE to a folder with space that can be written"
    )


def _write_tokens(
    path: Path, corpus: Corpus, tokenizer: Tokenizer, part: Part, dtype: np.dtype[Any]
) -> None:
    """Write the tokens of ``part`` to ``path``, which appears only when it is complete."""
    unfinished = path.with_suffix(".unfinished")
    try:
        unfinished.unlink(missing_ok=True)  # left by a dead process; never write through a link
        with unfinished.open("xb") as file:
            _tokenise(file, corpus, tokenizer, part, dtype)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        unfinished.unlink(missing_ok=True)  # otherwise a full disk would stay full for other runs
        raise
    unfinished.replace(path)


def _tokenise(
    file: BinaryIO, corpus: Corpus, tokenizer: Tokenizer, part: Part, dtype: np.dtype[Any]
) -> None:
    """Append the tokens of each document of ``part`` to ``file``, in order."""
    for document in corpus.rows:
        if part == "all" or document["held_out"] == (part == "validation"):
            file.write(np.asarray(tokenizer.encode(document["text"]), dtype=dtype).tobytes())
