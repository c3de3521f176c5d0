"""Promises of the loaders: what they yield depends on the seed and the position alone."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from titan_shampoo.data import DataError
from titan_shampoo.data.loader import Batch, EvaluationLoader, PositionedLoader


class Numbers:
    """Sample ``i`` is the vector (i, i), its labels are (i, -i)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        assert 0 <= index < self.size
        return torch.tensor([index, index]), torch.tensor([index, -index])

    def shortage(self, num_needed: int) -> str:
        return f"has {self.size} samples, {num_needed} are needed"


def add_noise(sample: Tensor, generator: torch.Generator) -> Tensor:
    return sample + torch.rand(2, generator=generator)


def loaders(num_samples, num_ranks, local_batch_size, *, seed=3, start=0, **options):
    of_ranks = [
        PositionedLoader(
            Numbers(num_samples),
            seed=seed,
            local_batch_size=local_batch_size,
            dp_rank=rank,
            dp_world_size=num_ranks,
            **options,
        )
        for rank in range(num_ranks)
    ]
    for loader in of_ranks:
        loader.load_state_dict({"samples": start})
    return of_ranks


def joined(batches: tuple[Batch, ...]) -> list[float]:
    """The first entry of every sample of one global batch, in rank order."""
    return [value for inputs, _ in batches for value in inputs["input"][:, 0].tolist()]


def sequence(of_ranks, num_batches):
    """The samples of so many global batches, one after another."""
    steps = islice(zip(*of_ranks, strict=True), num_batches)
    return [value for batches in steps for value in joined(batches)]


@given(
    num_samples=st.integers(12, 40),
    seed=st.integers(0, 2**63),
    num_ranks=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(num_samples, seed, num_ranks):
    alone = sequence(loaders(num_samples, 1, 12, seed=seed), 5)
    together = sequence(loaders(num_samples, num_ranks, 12 // num_ranks, seed=seed), 5)
    assert together == alone


@given(num_samples=st.integers(4, 30), seed=st.integers(0, 1000))
def test_every_epoch_visits_every_sample_once(num_samples, seed):
    seen = sequence(loaders(num_samples, 2, 2, seed=seed), num_samples)
    for epoch in range(4):
        this_epoch = seen[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(this_epoch) == list(range(num_samples))


def test_every_epoch_and_every_seed_has_its_own_order():
    orders = [
        tuple(order)
        for seed in (0, 1)
        for order in torch.tensor(sequence(loaders(20, 1, 20, seed=seed), 3)).view(3, 20).tolist()
    ]
    assert len(set(orders)) == 6


def test_the_order_is_the_one_that_older_checkpoints_count_in():
    expected = [1, 8, 5, 3, 7, 9, 4, 0, 6, 2, 9, 5, 8, 7, 6, 4, 0, 3, 1, 2]
    assert sequence(loaders(10, 1, 10, seed=42), 2) == expected


@given(num_taken=st.integers(0, 12), num_ranks=st.integers(1, 4), num_ranks_later=st.integers(1, 4))
def test_a_position_resumes_exactly_on_any_number_of_ranks(num_taken, num_ranks, num_ranks_later):
    before = loaders(17, num_ranks, 2)
    seen = sequence(before, num_taken)
    (state,) = {loader.state_dict()["samples"] for loader in before}
    seen += sequence(loaders(17, num_ranks_later, 3, start=state), 4)
    assert seen == sequence(loaders(17, 1, 1), len(seen))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_only_batches_handed_out_count_as_consumed(num_workers):
    (loader,) = loaders(50, 1, 4, num_workers=num_workers)
    expected = sequence(loaders(50, 1, 4), 6)
    batches = iter(loader)
    seen = [value for _ in range(3) for value in joined((next(batches),))]
    assert loader.state_dict() == {"samples": 12}
    assert seen + sequence([loader], 3) == expected


def test_augmentation_comes_back_on_other_ranks_and_after_a_resume():
    alone = sequence(loaders(10, 1, 4, augment=add_noise), 6)
    assert sequence(loaders(10, 2, 2, augment=add_noise), 6) == alone
    assert sequence(loaders(10, 4, 1, augment=add_noise, start=8), 4) == alone[8:]


def test_augmentation_differs_between_epochs():
    draws = sequence(loaders(10, 1, 10, augment=add_noise), 5)
    assert len({draw % 1 for draw in draws}) == 50


def test_labels_stay_with_their_inputs():
    (loader,) = loaders(10, 1, 4)
    for inputs, labels in islice(loader, 5):
        assert torch.equal(labels, inputs["input"] * torch.tensor([1, -1]))


def test_loading_data_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    sequence(loaders(10, 1, 4, augment=add_noise), 3)
    list(EvaluationLoader(Numbers(5), local_batch_size=2, dp_rank=0, dp_world_size=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_iterator_from_before_a_load_is_refused():
    (loader,) = loaders(10, 1, 2)
    batches = iter(loader)
    next(batches)
    loader.load_state_dict({"samples": 6})
    with pytest.raises(RuntimeError, match=r"position is 6, this iterator is at 2; call iter\(\)"):
        next(batches)


def test_less_than_one_global_batch_is_refused():
    with pytest.raises(DataError, match="has 7 samples, 8 are needed"):
        loaders(7, 4, 2)


def evaluation_batches(num_samples, num_ranks, local_batch_size, max_batches=None, spread=False):
    of_ranks = [
        EvaluationLoader(
            Numbers(num_samples),
            local_batch_size=local_batch_size,
            dp_rank=rank,
            dp_world_size=num_ranks,
            max_batches=max_batches,
            spread=spread,
        )
        for rank in range(num_ranks)
    ]
    batches = [list(loader) for loader in of_ranks]
    assert [len(loader) for loader in of_ranks] == [len(of_rank) for of_rank in batches]
    return batches


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5))
def test_evaluation_counts_every_sample_once_in_equal_batches(num_samples, num_ranks, batch_size):
    of_ranks = evaluation_batches(num_samples, num_ranks, batch_size)
    counted = []
    for batches in of_ranks:
        for inputs, labels in batches:
            assert inputs["input"].shape == labels.shape == (batch_size, 2)
            is_real = (labels != -100).all(dim=1)
            assert torch.equal(labels[is_real], inputs["input"][is_real] * torch.tensor([1, -1]))
            assert (labels[~is_real] == -100).all()
            counted += inputs["input"][is_real][:, 0].tolist()
    assert sorted(counted) == list(range(num_samples))
    assert len({len(batches) for batches in of_ranks}) == 1


def test_evaluation_stops_after_the_batches_asked_for():
    of_ranks = evaluation_batches(40, 2, 3, max_batches=2)
    counted = sorted(int(i) for rank in of_ranks for _, labels in rank for i in labels[:, 0])
    assert counted == list(range(12))


def spread_samples(num_samples, num_ranks, batch_size, num_batches):
    of_ranks = evaluation_batches(num_samples, num_ranks, batch_size, num_batches, spread=True)
    return sorted(int(row) for rank in of_ranks for _, labels in rank
                  for row, other in labels if other != -100)  # fmt: skip


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 60), st.integers(1, 4))
def test_samples_that_are_spread_take_of_every_class_its_share(
    num_samples, batch_size, class_size, num_batches
):
    taken = spread_samples(num_samples, 1, batch_size, num_batches)
    assert len(taken) == len(set(taken)) == min(num_samples, batch_size * num_batches)
    for first in range(0, num_samples, class_size):
        last = min(first + class_size, num_samples)
        share = (last - first) * len(taken) / num_samples
        assert abs(sum(first <= row < last for row in taken) - share) < 1


@pytest.mark.parametrize("num_samples", [37, 48])
def test_samples_that_are_spread_are_the_same_on_any_number_of_ranks(num_samples):
    taken = spread_samples(num_samples, 1, 12, 2)
    assert taken[0] <= 1
    assert taken[-1] >= num_samples - 2
    for num_ranks in (2, 3, 4, 6):
        assert spread_samples(num_samples, num_ranks, 12 // num_ranks, 2) == taken


def test_evaluation_of_nothing_is_refused():
    with pytest.raises(DataError, match="has 0 samples, 1 are needed"):
        EvaluationLoader(Numbers(0), local_batch_size=2, dp_rank=0, dp_world_size=1)
