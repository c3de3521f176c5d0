"""Text that is read during training, for data sets too large to be tokenised first.

A data set is cut into a fixed number of stream shards, whatever the number of ranks. Shard ``l``
reads files ``l, l + shards, ...`` or, if there are fewer files than shards, its part of the
documents of one file. Sample ``i`` of the endless sequence is the next window of shard
``i % shards``. The sequence is thus the same on any number of ranks, and a position is one integer.
A rank reads only the shards of its own rows: a part of the data if the global batch and the number
of shards divide each other. Documents keep the order of the data set. A resumed run reads its
shards from the start up to its position.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from titan_shampoo.data import DataError, UnreadableSampleError
from titan_shampoo.data.documents import Document, Row, json_rows, table_rows
from titan_shampoo.data.loader import Batch
from titan_shampoo.data.skipped import SkippedSamples
from titan_shampoo.data.sources import (
    check_folder,
    load_hub_split,
    local_json_lines,
    readable_tables,
)
from titan_shampoo.data.tokenizer import Tokenizer

__all__ = ["StreamLoader", "StreamedWindows", "TextStream"]

Window = NDArray[np.int64]


class TextStream:
    """The documents of a data set, as endless windows of tokens in stream shards.

    Args:
        source: A hub data set as "name", "name:config" or "name:config:split", or a local folder.
        tokenizer: Called once per document.
        seq_len: Predictions per window.
        num_shards: Number of stream shards, at least one.
        key: The TOML key that holds ``source``, for messages.
        hold_out: True to leave 5% of the documents out of all shards.
        max_bad_fraction: Largest share of unreadable rows.
    """

    def __init__(
        self,
        source: str,
        *,
        tokenizer: Tokenizer,
        seq_len: int,
        num_shards: int,
        key: str = "training.dataset",
        hold_out: bool = True,
        max_bad_fraction: float = 0.0,
    ) -> None:
        """Open the data set; no document is read yet.

        Raises:
            DataError: If it cannot be loaded.
        """
        self._files = local_json_lines(source)
        self._rows: Any = None
        if not self._files:
            self._rows = load_hub_split(source, key=key, streaming=True)
        self._num_files: int = len(self._files) or self._rows.num_shards
        check_folder(source, max_bad_fraction)
        self._source = source
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._hold_out = hold_out
        self._where = f'{key} = "{source}"'
        self.num_shards = num_shards
        self.skipped = SkippedSamples(max_bad_fraction)

    def windows(self, shard: int) -> Iterator[Window]:
        """The windows ``(seq_len + 1,)`` of a stream shard, pass after pass, without end.

        Raises:
            DataError: If the shard holds no text to train on, or too much is unreadable.
        """
        left = np.empty(0, dtype=np.int64)
        while True:
            size = -1
            for text in self._texts(shard):
                tokens = np.asarray(self._tokenizer.encode(text), dtype=np.int64)
                left = np.concatenate([left, tokens])
                size = max(size, len(left))
                while len(left) > self._seq_len:
                    yield left[: self._seq_len + 1]
                    left = left[self._seq_len :]
            if size <= 1:
                skipped = f" ({self.skipped.count} rows were skipped)" if self.skipped.count else ""
                raise DataError(
                    f"{self._where}: stream shard {shard} of {self.num_shards} has no text to "
                    f"train on{skipped}; lower training.stream_lanes, or set "
                    "training.streaming = false"
                )

    def held_out(self, num_windows: int) -> Iterator[Window]:
        """The first windows of the held-out documents, up to ``num_windows``."""
        left = np.empty(0, dtype=np.int64)
        for document in self._documents(self._rows_of(file) for file in range(self._num_files)):
            if num_windows and document["held_out"]:
                tokens = np.asarray(self._tokenizer.encode(document["text"]), dtype=np.int64)
                left = np.concatenate([left, tokens])
                while num_windows and len(left) > self._seq_len:
                    yield left[: self._seq_len + 1]
                    left = left[self._seq_len :]
                    num_windows -= 1
            if not num_windows:
                return

    def _texts(self, shard: int) -> Iterator[str]:
        """One pass over the documents of a stream shard, without held-out ones."""
        for document in self._documents(self._shard_rows(shard)):
            if not (self._hold_out and document["held_out"]):
                yield document["text"]

    def _documents(self, files: Iterable[Iterator[Row]]) -> Iterator[Document]:
        for row in chain.from_iterable(files):
            if isinstance(row, UnreadableSampleError):
                self.skipped.add([str(row)], num_read=0)
            elif row is not None:
                self.skipped.add([], num_read=1)
                yield row

    def _shard_rows(self, shard: int) -> Iterator[Iterator[Row]]:
        """Rows of a stream shard by file: of its own files, or its part of a common file."""
        if self._num_files >= self.num_shards:
            files = range(shard, self._num_files, self.num_shards)
            return (self._rows_of(file) for file in files)
        file = shard % self._num_files
        sharing = len(range(file, self.num_shards, self._num_files))
        return iter([self._rows_of(file, part=shard // self._num_files, parts=sharing)])

    def _rows_of(self, file: int, *, part: int = 0, parts: int = 1) -> Iterator[Row]:
        """Rows ``part``, ``part + parts``, ... of a file."""
        if self._files:
            return json_rows(self._files[file], part=part, parts=parts)
        place = f"{self._source}: file {file + 1} of {self._num_files}"
        rows = self._rows.shard(num_shards=self._num_files, index=file, contiguous=False)
        return table_rows(readable_tables(rows, place), place, part=part, parts=parts)


class StreamLoader:
    """An endless loader of a stream, like ``PositionedLoader`` for samples with an index.

    Its state is the number of samples that all ranks consumed together, and the number of stream
    shards.
    """

    num_samples: None = None
    """Not known."""

    def __init__(
        self, stream: TextStream, *, local_batch_size: int, dp_rank: int, dp_world_size: int
    ) -> None:
        """Take this rank's rows of every batch of ``stream``.

        Args:
            stream: The text.
            local_batch_size: Samples per batch on this rank.
            dp_rank: Number of this rank among those that read different data.
            dp_world_size: Number of ranks that read different data.
        """
        self._stream = stream
        self._global_batch_size = local_batch_size * dp_world_size
        self._first_row = dp_rank * local_batch_size
        self._local_batch_size = local_batch_size
        self._num_consumed = 0
        self.skipped = stream.skipped

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on, without end.

        Raises:
            RuntimeError: If a load or another iterator has changed the position since.
            DataError: If a stream shard has no text, or too many rows are unreadable.
        """
        position = self._num_consumed
        shards = _StreamShards(self._stream)
        while True:
            first = position + self._first_row
            rows = [shards.window(row) for row in range(first, first + self._local_batch_size)]
            if self._num_consumed != position:
                raise RuntimeError(
                    f"the data position is {self._num_consumed}, this iterator is at {position}; "
                    "call iter() again after load_state_dict()"
                )
            position += self._global_batch_size
            self._num_consumed = position
            windows = torch.from_numpy(np.stack(rows))
            yield {"input": windows[:, :-1]}, windows[:, 1:]

    def state_dict(self) -> dict[str, int]:
        """The position, equal on all ranks and valid on any number of them."""
        return {"samples": self._num_consumed, "lanes": self._stream.num_shards}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after ``samples`` samples, consumed by any number of ranks.

        Raises:
            DataError: If they are samples of another sequence.
        """
        saved = state_dict.get("lanes")
        if saved != self._stream.num_shards:
            raise DataError(
                f"training.stream_lanes = {self._stream.num_shards}: the checkpoint is of a run "
                + (f"with {saved}; set it to that" if saved else "with training.streaming = false")
            )
        self._num_consumed = int(state_dict["samples"])


class _StreamShards:
    """The stream shards that a rank reads, each opened at its first window."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._open: dict[int, tuple[Iterator[Window], int]] = {}

    def window(self, position: int) -> Window:
        """Sample ``position`` of the endless sequence; positions in a shard must ascend."""
        number, shard = divmod(position, self._stream.num_shards)
        windows, num_read = self._open.get(shard) or (self._stream.windows(shard), 0)
        for _ in range(number - num_read):
            next(windows)
        window = next(windows)
        self._open[shard] = (windows, number + 1)
        return window


class StreamedWindows:
    """(input, labels) pairs of a validation part, held in memory."""

    def __init__(self, windows: Iterator[Window], *, where: str) -> None:
        """Read all windows.

        Args:
            windows: A finite iterator.
            where: The key and the source, for messages.
        """
        self._windows = [torch.from_numpy(window) for window in windows]
        self._where = where

    def __len__(self) -> int:
        """The number of windows."""
        return len(self._windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Input and labels, int64 ``(seq_len,)`` each."""
        window = self._windows[index]
        return window[:-1], window[1:]

    def shortage(self, num_needed: int) -> str:
        """Error message for a run that needs at least ``num_needed`` windows."""
        return (
            f"{self._where} has {len(self)} windows of text to validate on, {num_needed} are "
            "needed; set validation.dataset, or lower validation.seq_len"
        )
