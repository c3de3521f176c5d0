"""Promises of the digits, the images that need no download."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import avg_pool2d

from titan_shampoo.data import DataError
from titan_shampoo.data.digits import Digits
from titan_shampoo.data.loader import EvaluationLoader, PositionedLoader


def stacked(dataset):
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


def test_digits_are_split_in_file_order():
    train, validation = Digits(), Digits(part="validation")
    labels = [data[index][1] for data in (train, validation) for index in range(len(data))]
    assert labels == load_digits().target.tolist()
    assert (len(train), len(validation)) == (1438, 359)


def test_training_images_are_normalised():
    images = stacked(Digits())
    assert images.shape == (1438, 3, 32, 32)
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_validation_images_are_scaled_like_training_images():
    blank = Digits()[0][0].min()
    assert Digits(part="validation")[0][0].min() == blank


def test_enlarged_images_show_the_same_digits():
    small = torch.from_numpy(load_digits().images[:100]).float().flatten(1)
    large = avg_pool2d(stacked(Digits())[:100, 0], 4).flatten(1)
    pairs = torch.stack([small, large], dim=1)
    assert min(torch.corrcoef(pair)[0, 1].item() for pair in pairs) > 0.95


def test_batches_of_images_have_int64_classes():
    dataset = Digits()
    loader = PositionedLoader(dataset, seed=0, local_batch_size=4, dp_rank=1, dp_world_size=2)
    inputs, labels = next(iter(loader))
    assert inputs["input"].shape == (4, 3, 32, 32)
    assert labels.dtype == torch.int64
    assert labels.shape == (4,)


def test_padded_images_have_no_class():
    dataset = Digits(part="validation")
    loader = EvaluationLoader(dataset, local_batch_size=200, dp_rank=1, dp_world_size=2)
    ((_, labels),) = loader
    assert (labels != -100).sum() == 159


def test_a_batch_larger_than_the_data_is_refused_with_the_numbers():
    with pytest.raises(DataError, match=r"1438 images here, 2000 are needed .*local_batch_size"):
        PositionedLoader(Digits(), seed=0, local_batch_size=1000, dp_rank=0, dp_world_size=2)


def test_settings_are_chosen_on_images_that_are_no_test():
    parts = [Digits(source="digits_tuning", part=part) for part in ("validation", "train")]
    labels = [data[index][1] for data in parts for index in range(len(data))]
    assert labels == load_digits().target[:1438].tolist()
    assert [len(part) for part in parts] == [575, 863]
