"""Batches whose content depends on the seed and the number of samples consumed, nothing else.

Sample ``i`` of the endless sequence is drawn in epoch ``i // len(dataset)`` from that epoch's own
permutation, keyed by (seed, epoch). Rank ``r`` of ``R`` takes rows ``[r * b, (r + 1) * b)`` of each
batch of ``R * b`` samples. A position is thus one integer with the same meaning on any number of
ranks, and random draws inside a sample, keyed by ``i``, repeat exactly after a resume. A sample
that cannot be read is replaced by the next one of the data set, whatever the number of ranks.
"""

from collections.abc import Callable, Iterator, Sized
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from titan_shampoo.data import DataError, UnreadableSampleError
from titan_shampoo.data.mixup import mix_pairs, pair_weights
from titan_shampoo.data.skipped import SkippedSamples
from titan_shampoo.stopping import ignore

__all__ = ["Augmentation", "Batch", "EvaluationLoader", "IndexedSamples", "PositionedLoader"]

_MOST_SKIPPED_IN_A_ROW = 100

IGNORED_LABEL = -100
"""Cross-entropy's default ``ignore_index``, which torchtitan does not count as a target either."""

Batch = tuple[dict[str, Tensor], Tensor]
Augmentation = Callable[[Any, torch.Generator], Tensor]
"""A random change of one input of the data set: a tensor or an image."""


class IndexedSamples(Sized, Protocol):
    """A map-style data set of (input, label) pairs, of equal shapes after augmentation."""

    def __getitem__(self, index: int) -> tuple[Any, Tensor | int]:
        """The input and its label or labels; raises ``UnreadableSampleError`` if it is broken."""
        ...

    def shortage(self, num_needed: int) -> str:
        """Error message for a run that needs at least ``num_needed`` samples."""
        ...


class PositionedLoader:
    """An endless loader; its state is the number of samples that all ranks consumed together.

    Every call of ``iter`` starts at the current position. A batch counts as consumed once it is
    yielded, not when a worker prepares it.
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
        mixup: float = 0.0,
        max_bad_fraction: float = 0.0,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Take this rank's rows of every batch of ``dataset``.

        Args:
            dataset: The samples; at least one global batch of them.
            seed: Key of the order and of the augmentation, at least zero.
            local_batch_size: Samples per batch on this rank.
            dp_rank: Number of this rank among those that read different data.
            dp_world_size: Number of ranks that read different data.
            augment: Random change of one input; draws only from the generator passed to it.
            mixup: Both parameters of the beta distribution of the weights by which neighbours are
                mixed; 0 for no mixing. Otherwise ``local_batch_size`` must be even.
            max_bad_fraction: Largest share of unreadable samples.
            num_workers: Processes that prepare batches ahead; 0 for this one, on demand.
            prefetch_factor: Batches that each worker keeps ready; only with workers.
            pin_memory: True to copy batches to page-locked memory.

        Raises:
            DataError: If the data set is smaller than one global batch.
            ValueError: If neighbours are mixed and ``local_batch_size`` is odd.
        """
        if mixup and local_batch_size % 2:
            raise ValueError(f"local_batch_size: got {local_batch_size}, mixup needs an even one")
        self._global_batch_size = local_batch_size * dp_world_size
        if len(dataset) < self._global_batch_size:
            raise DataError(dataset.shortage(self._global_batch_size))
        self._order = _SampleOrder(len(dataset), seed)
        self._samples = _AugmentedSamples(dataset, seed, augment)
        self._seed = seed
        self._mixup = mixup
        self.skipped = SkippedSamples(max_bad_fraction)
        self.num_samples = len(dataset)
        self._local_batch_size = local_batch_size
        self._first_row = dp_rank * local_batch_size
        self._num_workers = num_workers
        self._prefetch_factor = prefetch_factor
        self._pin_memory = pin_memory
        self._num_consumed = 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on, without end.

        Raises:
            RuntimeError: If a load or another iterator has changed the position since.
            DataError: If too many samples are unreadable.
        """
        position = self._num_consumed
        batches = _batches(
            self._samples,
            self._rows_from(position),
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor,
            pin_memory=self._pin_memory,
        )
        for inputs, labels, skipped in batches:
            if self._num_consumed != position:
                raise RuntimeError(
                    f"the data position is {self._num_consumed}, this iterator is at {position}; "
                    "call iter() again after load_state_dict()"
                )
            self.skipped.add(skipped, num_read=len(labels))
            first = position + self._first_row
            position += self._global_batch_size
            self._num_consumed = position
            if self._mixup:
                weights = pair_weights(self._seed, first, len(labels), self._mixup)
                yield {"input": mix_pairs(inputs, weights), "label_weight": weights}, labels
            else:
                yield {"input": inputs}, labels

    def state_dict(self) -> dict[str, int]:
        """The number of samples consumed by all ranks together; equal on all ranks."""
        return {"samples": self._num_consumed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after ``samples`` samples, consumed by any number of ranks."""
        self._num_consumed = int(state_dict["samples"])

    def _rows_from(self, position: int) -> Iterator[list[tuple[int, int]]]:
        """Per batch, the (position, index) pairs of this rank's rows."""
        while True:
            first = position + self._first_row
            rows = range(first, first + self._local_batch_size)
            yield [(row, self._order.index(row)) for row in rows]
            position += self._global_batch_size


class EvaluationLoader:
    """One pass over a data set in file order, with as many batches of equal shape on every rank.

    A shortened pass takes the first samples, or samples spread evenly: if files are ordered by
    class, the same share of each class. The choice depends on their number alone, not on the number
    of ranks.

    Rows after the end are the first sample with its labels set to -100. All ranks thus take the
    same collective steps, and the padding does not count.
    """

    def __init__(
        self,
        dataset: IndexedSamples,
        *,
        local_batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        max_batches: int | None = None,
        spread: bool = False,
        max_bad_fraction: float = 0.0,
        num_workers: int = 0,
    ) -> None:
        """Take this rank's rows of every batch of ``dataset``.

        Args:
            dataset: The samples; at least one.
            local_batch_size: Samples per batch on this rank.
            dp_rank: Number of this rank among those that read different data.
            dp_world_size: Number of ranks that read different data.
            max_batches: Number of batches of a shortened pass; None for the whole data set.
            spread: True to spread a shortened pass evenly over the data set.
            max_bad_fraction: Largest share of unreadable samples, which do not count.
            num_workers: Processes that prepare batches ahead; 0 for this one, on demand.

        Raises:
            DataError: If the data set is empty.
        """
        if len(dataset) < 1:
            raise DataError(dataset.shortage(1))
        self._samples = _PaddedSamples(dataset)
        self.skipped = SkippedSamples(max_bad_fraction)
        self._local_batch_size = local_batch_size
        self._first_row = dp_rank * local_batch_size
        self._global_batch_size = local_batch_size * dp_world_size
        num_batches = -(-len(dataset) // self._global_batch_size)
        self._num_batches = num_batches if max_batches is None else min(num_batches, max_batches)
        self._num_samples = len(dataset)
        self._num_taken = len(dataset)
        if spread:
            self._num_taken = min(len(dataset), self._num_batches * self._global_batch_size)
        self._num_workers = num_workers

    def __len__(self) -> int:
        """The number of batches in a pass, equal on all ranks."""
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches of one pass."""
        rows = self._rows()
        batches = _batches(self._samples, rows, num_workers=self._num_workers)
        for inputs, labels, skipped in batches:
            self.skipped.add(skipped, num_read=len(labels))
            yield {"input": inputs}, labels

    def _rows(self) -> Iterator[list[int]]:
        """Per batch, the indices of this rank's rows; indices after the end are padding."""
        for batch in range(self._num_batches):
            first = batch * self._global_batch_size + self._first_row
            places = range(first, first + self._local_batch_size)
            yield [self._index(place) for place in places]

    def _index(self, place: int) -> int:
        """The sample in the middle of run ``place`` of the data set; runs are equally long."""
        if place >= self._num_taken:
            return self._num_samples
        return (2 * place + 1) * self._num_samples // (2 * self._num_taken)


class _SampleOrder:
    """The endless order of the samples, with the permutation of the last requested epoch."""

    _permutation: NDArray[np.int64]  # (num_samples,)

    def __init__(self, num_samples: int, seed: int) -> None:
        self._num_samples = num_samples
        self._seed = seed
        self._epoch = -1

    def index(self, position: int) -> int:
        """Index in the data set of sample ``position`` of the endless sequence."""
        epoch, place = divmod(position, self._num_samples)
        if epoch != self._epoch:
            # RandomState, not default_rng: numpy promises that its stream never changes. Another
            # order would make resumed runs repeat some samples and miss others.
            key = np.random.SeedSequence((self._seed, epoch))
            shuffle = np.random.RandomState(np.random.MT19937(key))
            self._permutation = shuffle.permutation(self._num_samples)
            self._epoch = epoch
        return int(self._permutation[place])


class _Sample(NamedTuple):
    """One row of a batch, with messages on unreadable samples that it replaces."""

    input: Tensor
    label: Tensor | int
    skipped: tuple[str, ...]


class _AugmentedSamples(Dataset[_Sample]):
    """Samples by (position, index): the index selects, the position keys the random draws."""

    def __init__(self, dataset: IndexedSamples, seed: int, augment: Augmentation | None) -> None:
        self._dataset = dataset
        self._seed = seed
        self._augment = augment

    def __getitem__(self, place: tuple[int, int]) -> _Sample:
        position, index = place
        sample, label, skipped = _first_readable(self._dataset, index)
        if self._augment is not None:
            # Three words, but the key of the order has two: the streams never coincide.
            key = np.random.SeedSequence((self._seed, position, 1)).generate_state(1, np.uint64)
            # manual_seed takes a signed 64-bit integer.
            generator = torch.Generator().manual_seed(int(key[0] >> np.uint64(1)))
            sample = self._augment(sample, generator)
        return _Sample(sample, label, skipped)


class _PaddedSamples(Dataset[_Sample]):
    """The samples, followed without end by one without targets."""

    def __init__(self, dataset: IndexedSamples) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> _Sample:
        if index < len(self._dataset):
            try:
                sample, label = self._dataset[index]
                return _Sample(sample, torch.as_tensor(label), ())
            except UnreadableSampleError as error:
                return self._padding((str(error),))
        return self._padding(())

    def _padding(self, skipped: tuple[str, ...]) -> _Sample:
        sample, label, _ = _first_readable(self._dataset, 0)
        return _Sample(sample, torch.full_like(torch.as_tensor(label), IGNORED_LABEL), skipped)


def _first_readable(
    dataset: IndexedSamples, index: int
) -> tuple[Any, Tensor | int, tuple[str, ...]]:
    """Sample ``index`` or, if it is broken, the next readable one; messages on skipped ones."""
    skipped: list[str] = []
    while len(skipped) < min(len(dataset), _MOST_SKIPPED_IN_A_ROW):
        try:
            sample, label = dataset[(index + len(skipped)) % len(dataset)]
        except UnreadableSampleError as error:
            skipped.append(str(error))
        else:
            return sample, label, tuple(skipped)
    raise DataError(
        f"{len(skipped)} samples in a row cannot be read, such as {skipped[0]}; repair or remove "
        "them, or set training.dataset or validation.dataset to other data"
    )


def _batches(
    samples: Dataset[_Sample],
    rows: Iterator[list[Any]],
    *,
    num_workers: int,
    prefetch_factor: int | None = None,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Inputs, labels and messages on skipped samples per list of rows, from torch's loader."""
    loader = DataLoader(
        samples,
        batch_sampler=rows,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        collate_fn=_collated,
        worker_init_fn=_outlast_signals,
        # Without a generator, the loader draws from torch's global one, and later draws of the
        # model would depend on how often the data was opened.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except DataError as error:  # a worker's error: its traceback, with the message in the last line
        message = str(error.args[0]).strip().splitlines()[-1]
        raise DataError(message.removeprefix("titan_shampoo.data.DataError: ")) from None


def _outlast_signals(worker: int) -> None:
    """Ignore the signals that torchrun sends to all processes of a rank: the last step needs data.

    A worker ends when its rank does.
    """
    ignore()


def _collated(samples: list[_Sample]) -> tuple[Tensor, Tensor, list[str]]:
    inputs = default_collate([sample.input for sample in samples])
    labels = default_collate([sample.label for sample in samples])
    return inputs, labels, [message for sample in samples for message in sample.skipped]
