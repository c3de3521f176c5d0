"""Batches whose content depends on the seed and the number of samples consumed, nothing else.

Sample ``i`` of the endless sequence is drawn in epoch ``i // len(dataset)`` from that epoch's own
permutation, keyed by (seed, epoch); rank ``r`` of ``R`` takes rows ``[r * b, (r + 1) * b)`` of each
batch of ``R * b`` samples. So a position is one integer that means the same on any number of ranks,
and random draws inside a sample, keyed by ``i``, come back exactly after a resume.
"""

from collections.abc import Callable, Iterator, Sized
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from titan_shampoo.data import DataError

__all__ = ["Augmentation", "Batch", "EvaluationLoader", "IndexedSamples", "PositionedLoader"]

IGNORED_LABEL = -100
"""Cross-entropy's default ``ignore_index``: what torchtitan does not count as a target either."""

Batch = tuple[dict[str, Tensor], Tensor]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]


class IndexedSamples(Sized, Protocol):
    """A map-style data set of (input, label) pairs of equal shapes."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | int]:
        """The input and its label or labels."""
        ...

    def shortage(self, num_needed: int) -> str:
        """The sentence that refuses a run which needs at least ``num_needed`` samples."""
        ...


class PositionedLoader:
    """An endless loader; its state is the number of samples that all ranks consumed together.

    Every call of ``iter`` starts at the current position. A batch counts as consumed when it is
    handed out, not when a worker prepares it.
    """

    def __init__(
        self,
        dataset: IndexedSamples,
        *,
        seed: int,
        local_batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        augment: Augmentation | None = None,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Take this rank's rows of every batch of ``dataset``.

        Args:
            dataset: The samples; at least one global batch of them.
            seed: Key of the order and of the augmentation, at least zero.
            local_batch_size: Samples per batch on this rank.
            dp_rank: This rank among those that read different data.
            dp_world_size: How many ranks read different data.
            augment: Random change of one input, drawing only from the generator it is given.
            num_workers: Processes that prepare batches ahead; 0 means this one, on demand.
            prefetch_factor: Batches that each worker keeps ready; only with workers.
            pin_memory: Copy batches to page-locked memory.

        Raises:
            DataError: If the data set is smaller than one global batch.
        """
        self._global_batch_size = local_batch_size * dp_world_size
        if len(dataset) < self._global_batch_size:
            raise DataError(dataset.shortage(self._global_batch_size))
        self._order = _SampleOrder(len(dataset), seed)
        self._samples = _AugmentedSamples(dataset, seed, augment)
        self._local_batch_size = local_batch_size
        self._first_row = dp_rank * local_batch_size
        self._num_workers = num_workers
        self._prefetch_factor = prefetch_factor
        self._pin_memory = pin_memory
        self._num_consumed = 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on, for ever.

        Raises:
            RuntimeError: If the position was changed since by a load or by another iterator.
        """
        position = self._num_consumed
        batches = _batches(
            self._samples,
            self._rows_from(position),
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor,
            pin_memory=self._pin_memory,
        )
        for inputs, labels in batches:
            if self._num_consumed != position:
                raise RuntimeError(
                    f"the data position is {self._num_consumed}, this iterator is at {position}; "
                    "call iter() again after load_state_dict()"
                )
            position += self._global_batch_size
            self._num_consumed = position
            yield {"input": inputs}, labels

    def state_dict(self) -> dict[str, int]:
        """The number of samples consumed by all ranks together; equal on all ranks."""
        return {"samples": self._num_consumed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after ``samples`` samples, whatever number of ranks consumed them."""
        self._num_consumed = int(state_dict["samples"])

    def _rows_from(self, position: int) -> Iterator[list[tuple[int, int]]]:
        """Per batch, the (position, index) pairs of this rank's rows."""
        while True:
            first = position + self._first_row
            rows = range(first, first + self._local_batch_size)
            yield [(row, self._order.index(row)) for row in rows]
            position += self._global_batch_size


class EvaluationLoader:
    """One pass over a data set in file order, in as many equal-shaped batches on every rank.

    Rows past the end are the first sample with its labels set to -100, so that ranks take the same
    collective steps and the padding counts for nothing.
    """

    def __init__(
        self,
        dataset: IndexedSamples,
        *,
        local_batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        max_batches: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Take this rank's rows of every batch of ``dataset``.

        Args:
            dataset: The samples; at least one.
            local_batch_size: Samples per batch on this rank.
            dp_rank: This rank among those that read different data.
            dp_world_size: How many ranks read different data.
            max_batches: Stop after so many batches; None means the whole data set.
            num_workers: Processes that prepare batches ahead; 0 means this one, on demand.

        Raises:
            DataError: If the data set is empty.
        """
        if len(dataset) < 1:
            raise DataError(dataset.shortage(1))
        self._samples = _PaddedSamples(dataset)
        self._local_batch_size = local_batch_size
        self._first_row = dp_rank * local_batch_size
        self._global_batch_size = local_batch_size * dp_world_size
        num_batches = -(-len(dataset) // self._global_batch_size)
        self._num_batches = num_batches if max_batches is None else min(num_batches, max_batches)
        self._num_workers = num_workers

    def __len__(self) -> int:
        """The number of batches in a pass, equal on all ranks."""
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches of one pass."""
        rows = self._rows()
        for inputs, labels in _batches(self._samples, rows, num_workers=self._num_workers):
            yield {"input": inputs}, labels

    def _rows(self) -> Iterator[list[int]]:
        """Per batch, the indices of this rank's rows; those past the end are padding."""
        for batch in range(self._num_batches):
            first = batch * self._global_batch_size + self._first_row
            yield list(range(first, first + self._local_batch_size))


class _SampleOrder:
    """The endless order of the samples; remembers the permutation of the epoch asked last."""

    _permutation: NDArray[np.int64]  # (num_samples,)

    def __init__(self, num_samples: int, seed: int) -> None:
        self._num_samples = num_samples
        self._seed = seed
        self._epoch = -1

    def index(self, position: int) -> int:
        """Which sample of the data set is number ``position`` of the endless sequence."""
        epoch, place = divmod(position, self._num_samples)
        if epoch != self._epoch:
            # RandomState, not default_rng: numpy promises that its stream never changes, and a
            # changed order would make resumed runs repeat some samples and miss others.
            key = np.random.SeedSequence((self._seed, epoch))
            shuffle = np.random.RandomState(np.random.MT19937(key))
            self._permutation = shuffle.permutation(self._num_samples)
            self._epoch = epoch
        return int(self._permutation[place])


class _AugmentedSamples(Dataset[tuple[Tensor, Tensor | int]]):
    """Samples by (position, index): the index says which, the position keys the random draws."""

    def __init__(self, dataset: IndexedSamples, seed: int, augment: Augmentation | None) -> None:
        self._dataset = dataset
        self._seed = seed
        self._augment = augment

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor | int]:
        position, index = place
        sample, label = self._dataset[index]
        if self._augment is not None:
            # Three words, where the order's key has two: the streams never coincide.
            key = np.random.SeedSequence((self._seed, position, 1)).generate_state(1, np.uint64)
            # manual_seed takes a signed 64-bit integer.
            generator = torch.Generator().manual_seed(int(key[0] >> np.uint64(1)))
            sample = self._augment(sample, generator)
        return sample, label


class _PaddedSamples(Dataset[tuple[Tensor, Tensor]]):
    """The samples, continued for ever by one that has nothing to predict."""

    def __init__(self, dataset: IndexedSamples) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        is_padding = index >= len(self._dataset)
        sample, label = self._dataset[0 if is_padding else index]
        label = torch.as_tensor(label)
        return sample, torch.full_like(label, IGNORED_LABEL) if is_padding else label


def _batches(
    samples: Dataset[Any],
    rows: Iterator[list[Any]],
    *,
    num_workers: int,
    prefetch_factor: int | None = None,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Collated (inputs, labels) for each list of rows, prepared by torch's loader."""
    loader = DataLoader(
        samples,
        batch_sampler=rows,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        # Without one of its own, the loader draws from torch's global generator, and whatever the
        # model draws next would depend on how often the data was opened.
        generator=torch.Generator(),
    )
    yield from loader
