"""The same seed and global batch give the same first steps on every mesh."""

import numpy as np
import pytest
import torch.distributed as dist

from tests.support.ranks import run_on_ranks
from tests.support.titan_runs import (
    GLOBAL_BATCH,
    LAYOUTS,
    image_run,
    records,
    text_run,
    train_all,
    trainer_of,
    write_text,
)


def run_of(folder, name, num_readers, settings):
    batch = {
        "training__local_batch_size": GLOBAL_BATCH // num_readers,
        "validation__local_batch_size": GLOBAL_BATCH // num_readers,
        "validation__enable": True,
    }
    return text_run(folder, name, **{**batch, **settings})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The dump folders of all layouts, trained for two steps."""
    folder = tmp_path_factory.mktemp("layouts")
    write_text(folder)
    run_on_ranks(1, train_all, [run_of(folder, "one", 1, {})])
    for world_size in (2, 4):
        runs = [
            run_of(folder, name, num_readers, settings)
            for name, (size, num_readers, settings) in LAYOUTS.items()
            if size == world_size
        ]
        run_on_ranks(world_size, train_all, runs)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_loss_is_that_of_one_rank(trained, layout):
    expected = records(trained, "one", "loss")[1]
    assert records(trained, layout, "loss")[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name[:2] not in ("dd", "pp")])
def test_first_gradient_norm_is_that_of_one_rank(trained, layout):
    expected = records(trained, "one", "grad_norm")[1]
    assert records(trained, layout, "grad_norm")[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", ["ddp2", "ddp2_accumulated"])
def test_ddp_adds_gradients_up_and_does_not_average_them(trained, layout):
    expected = records(trained, "one", "grad_norm")[1]
    assert records(trained, layout, "grad_norm")[1] == pytest.approx(expected, rel=1e-5)


def test_pipeline_differentiates_the_mean_loss_and_not_the_sum(trained):
    expected = records(trained, "one", "grad_norm")[1]
    assert records(trained, "pp2", "grad_norm")[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_loss_is_that_of_one_rank(trained, layout):
    expected = records(trained, "one", "validation_loss")
    assert set(expected) == {1, 2}
    assert records(trained, layout, "validation_loss") == pytest.approx(expected, rel=1e-4)


def running_statistics(args):
    with trainer_of(args) as trainer:
        trainer.train()
        buffers = trainer.model_parts[0].named_buffers()
        return {name: buffer.numpy().copy() for name, buffer in buffers}


def images_on_two_ranks(folder):
    ddp = {
        "parallelism__data_parallel_replicate_degree": 2,
        "parallelism__data_parallel_shard_degree": 1,
    }
    validation = {"validation__enable": True, "validation__local_batch_size": 90}
    return [
        running_statistics(image_run(folder, "fsdp", **validation)),
        running_statistics(image_run(folder, "ddp", **ddp)),
        dist.get_rank(),
    ]


@pytest.fixture(scope="module")
def image_statistics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return folder, run_on_ranks(2, images_on_two_ranks, folder)


def test_images_have_the_same_first_step_under_fsdp2_and_ddp(image_statistics):
    folder, _ = image_statistics
    for key in ("loss", "grad_norm"):
        expected = records(folder, "ddp", key)[1]
        assert records(folder, "fsdp", key)[1] == pytest.approx(expected, rel=1e-5)


def test_image_validation_reports_an_accuracy(image_statistics):
    folder, _ = image_statistics
    accuracy = records(folder, "fsdp", "validation_accuracy")[1]
    assert 0 < accuracy < 1
    assert accuracy * 359 == pytest.approx(round(accuracy * 359))  # of 359 images, none twice


def test_running_statistics_are_the_same_on_all_ranks_and_have_moved(image_statistics):
    _, (first, second) = image_statistics
    for layout in (0, 1):
        for name, buffer in first[layout].items():
            np.testing.assert_array_equal(buffer, second[layout][name], err_msg=name)
        assert np.abs(first[layout]["bn1.running_mean"]).max() > 0
