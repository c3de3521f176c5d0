"""The image recipe on folders of images: equal on every mesh, with all that people switch on."""

import copy

import numpy as np
import pytest
import torch
import torch._dynamo.utils
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy, one_hot

from parallel.batch_norm import synchronise_batch_norm
from tests.support.ranks import run_on_ranks
from tests.support.titan_runs import image_run, records, train_all, trainer_of
from titan_shampoo.data.mixup import MixedLabels
from titan_shampoo.titan.averaging import AveragedWeights
from titan_shampoo.titan.images import class_loss


@pytest.fixture
def folder(tmp_path):
    """12 images of three classes to train on and five to validate."""
    random = np.random.RandomState(0)
    for index in range(17):
        part = "train" if index < 12 else "val"
        path = tmp_path / f"photos/{part}/{'abc'[index % 3]}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = random.randint(0, 256, (24, 20 + index, 3), dtype=np.uint8)
        Image.fromarray(values).save(path)
    return tmp_path


def photo_run(folder, dump, **changes):
    settings = {
        "training__dataset": folder / "photos",
        "training__steps": 3,
        "training__local_batch_size": 4,
        "optimizer__name": "SGD",
        "optimizer__implementation": "foreach",
        "optimizer__lr": 0.01,
        "lr_scheduler__warmup_steps": 0,
        "images__size": 16,
        "images__resize": 18,
        "images__mixup": 0.2,
        "images__label_smoothing": 0.1,
        "images__random_erasing": 0.2,
        "images__sync_batch_norm": True,
        "optimizer__average_decay": 0.5,
        "validation__enable": True,
        "validation__local_batch_size": 2,
    }
    return image_run(folder, dump, **(settings | changes))


def test_two_ranks_train_on_photographs_as_one_does(folder):
    run_on_ranks(1, train_all, [photo_run(folder, "one")])
    two = {"training__local_batch_size": 2}
    sharded = {"parallelism__data_parallel_shard_degree": 2}
    copies = {
        "parallelism__data_parallel_replicate_degree": 2,
        "parallelism__data_parallel_shard_degree": 1,
    }
    runs = [
        photo_run(folder, "sharded", **two, **sharded),
        photo_run(folder, "copies", **two, **copies),
    ]
    run_on_ranks(2, train_all, runs)
    for key in ("loss", "grad_norm", "validation_loss", "average_validation_loss"):
        expected = records(folder, "one", key)
        assert len(expected) >= 2
        for dump in ("sharded", "copies"):
            assert records(folder, dump, key) == pytest.approx(expected, rel=1e-4)
    assert records(folder, "one", "validation_top5") == {1: 1.0, 3: 1.0}
    seconds = records(folder, "one", "seconds")
    assert seconds[1] < seconds[3]


def test_small_images_are_evaluated_whole_but_for_an_eighth_where_no_scale_is_given(folder):
    given = photo_run(folder, "given", training__steps=1)
    position = given.index("--images.resize")
    assert given[position + 1] == "18"
    left_out = photo_run(folder, "left_out", training__steps=1)
    del left_out[position : position + 2]
    run_on_ranks(1, train_all, [given, left_out])
    for dump in ("given", "left_out"):
        losses = records(folder, dump, "validation_loss")
        assert losses == records(folder, "given", "validation_loss")
        assert losses


def test_epochs_and_milestones_become_steps(folder):
    args = photo_run(
        folder, "epochs", training__epochs=2, lr_scheduler__milestone_epochs="0.5,1.5",
        validation__enable=False, optimizer__lr=1.0,
    )  # fmt: skip
    position = args.index("--training.steps")
    del args[position : position + 2]
    schedule = args.index("--lr_scheduler.warmup_steps")
    del args[schedule : schedule + 2]
    args += ["--lr_scheduler.warmup_epochs", "0"]
    run_on_ranks(1, train_all, [args])
    rates = records(folder, "epochs", "lr")
    assert rates == pytest.approx({1: 1, 2: 1, 3: 0.1, 4: 0.1, 5: 0.01, 6: 0.01})


def test_the_average_and_the_seconds_go_on_after_a_resume(folder):
    whole = photo_run(folder, "whole", training__steps=3)
    saves = {"checkpoint__enable": True, "lr_scheduler__total_steps": 3}
    first, second = (photo_run(folder, "parts", training__steps=n, **saves) for n in (2, 3))
    run_on_ranks(1, train_all, [whole, first, second])
    key = "average_validation_loss"
    assert records(folder, "parts", key)[3] == records(folder, "whole", key)[3]
    seconds = records(folder, "parts", "seconds")
    assert seconds[1] < seconds[2] < seconds[3]


def test_a_dry_run_takes_one_step_and_writes_nothing(folder):
    args = [*photo_run(folder, "dry", checkpoint__enable=True), "--dry-run"]
    run_on_ranks(1, train_all, [args])
    assert not (folder / "dry").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"training__mixed_precision_param": "bfloat16", "images__channels_last": True},
        {"images__sync_batch_norm": False, "images__channels_last": True},
    ],
)
def test_other_formats_and_precisions_train_on_two_ranks(folder, changes):
    run = photo_run(
        folder, "run", training__local_batch_size=2, **changes, training__steps=2,
        parallelism__data_parallel_shard_degree=2,
    )  # fmt: skip
    run_on_ranks(2, train_all, [run])
    assert all(np.isfinite(loss) for loss in records(folder, "run", "loss").values())


def count_compiled_blocks(runs):
    train_all(runs)
    counts = torch._dynamo.utils.counters
    return counts["stats"]["unique_graphs"], counts["unimplemented"] | counts["recompile_limit"]


@pytest.mark.slow
def test_every_block_is_compiled_and_the_losses_are_the_same(tmp_path):
    common = {
        "training__steps": 3, "parallelism__data_parallel_shard_degree": 2, "images__size": 16,
        "validation__enable": True, "validation__freq": 3, "validation__steps": 1,
        "validation__local_batch_size": 2, "images__sync_batch_norm": True,
    }  # fmt: skip
    compiled = {"compile__enable": True, "compile__backend": "aot_eager"}
    runs = [
        image_run(tmp_path, "plain", **common),
        image_run(tmp_path, "compiled", **common, **compiled),
    ]
    (num_graphs, problems), _ = run_on_ranks(2, count_compiled_blocks, runs)
    assert not problems
    assert num_graphs >= 2 * 7  # in training and in evaluation, for each shape of block
    for key in ("loss", "validation_loss"):
        plain, others = (records(tmp_path, name, key) for name in ("plain", "compiled"))
        assert others == pytest.approx(plain, rel=1e-4)


def compare_batch_norms():
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()).double()
    synced = copy.deepcopy(plain)
    synchronise_batch_norm(synced, mesh)
    synced.load_state_dict(plain.state_dict())
    synced.double()
    images = torch.randn(4 * mesh.size(), 3, 7, 7, dtype=torch.float64) + 3
    mine = images.tensor_split(mesh.size())[mesh.get_local_rank()]
    for model, x in ((plain, images), (synced, mine)):
        model(x).square().sum().backward()
    for param in synced.parameters():
        dist.all_reduce(param.grad)
    for name, param in synced.named_parameters():
        torch.testing.assert_close(param.grad, plain.get_parameter(name).grad)
    for name, buffer in synced.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name))


def test_synchronised_batch_norm_is_that_of_the_whole_batch():
    run_on_ranks(3, compare_batch_norms)


def test_mixed_and_smoothed_labels_are_those_of_soft_targets():
    scores = torch.randn(4, 5, dtype=torch.float64)
    labels = torch.tensor([0, 3, 3, 1])
    weight = torch.tensor([0.7, 0.7, 0.9, 0.9])
    hard = one_hot(labels, 5).double()
    soft = weight[:, None] * hard + (1 - weight[:, None]) * hard[[1, 0, 3, 2]]
    expected = cross_entropy(scores, 0.9 * soft + 0.1 / 5, reduction="sum")
    mixed = class_loss(scores, MixedLabels(labels, weight), label_smoothing=0.1)
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_average_follows_the_weights_and_gives_them_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    average = AveragedWeights([model], 0.9)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for step in (1, 2):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(1)
        average.update(step)
    first, second = 2 / 11, 3 / 12
    expected = kept["0.weight"] + (1 - first) * second + 2 * (1 - second)
    with average.in_use():
        torch.testing.assert_close(model.state_dict()["0.weight"], expected)
    torch.testing.assert_close(model.state_dict()["0.weight"], kept["0.weight"] + 2)
    assert {"0.weight.average", "1.running_var.average"} <= average.state_dict().keys()
    assert "1.num_batches_tracked.average" not in average.state_dict()


def validated_labels(args):
    """Labels that this rank validates on."""
    with trainer_of(args) as trainer:
        labels = [int(label) for _, batch in trainer.validator._loader for label in batch]
    return [label for label in labels if label != -100]


def test_a_short_validation_sees_all_classes_on_any_number_of_ranks(folder):
    run = photo_run(folder, "one", validation__steps=1, validation__local_batch_size=4)
    (alone,) = run_on_ranks(1, validated_labels, run)
    assert sorted(alone) == [0, 0, 1, 2]
    changes = {"validation__local_batch_size": 2, "training__local_batch_size": 2}
    run = photo_run(folder, "two", validation__steps=1, **changes)
    first, second = run_on_ranks(2, validated_labels, run)
    assert first + second == alone
