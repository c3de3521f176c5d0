"""Taps in the real trainer: the same statistics on every mesh, whatever wraps the blocks."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from tests.support.ranks import run_on_ranks
from tests.support.reduced_statistics import reduced
from tests.support.titan_runs import text_run, trainer_of, write_text
from titan_shampoo.models.resnet import ResNet, ResNetArgs
from titan_shampoo.statistics import check_counts, tap

GLOBAL_BATCH, LENGTH = 8, 32
NUM_ROWS = GLOBAL_BATCH * LENGTH

DDP = {
    "parallelism__data_parallel_replicate_degree": 2,
    "parallelism__data_parallel_shard_degree": 1,
}
COMPILED = {"compile__enable": True, "compile__backend": "aot_eager"}
# World size, data-parallel ranks, settings.
LAYOUTS = {
    "selective": (1, 1, {"activation_checkpoint__mode": "selective"}),
    "compiled_selective": (1, 1, {**COMPILED, "activation_checkpoint__mode": "selective"}),
    "fsdp2": (2, 2, {}),
    "fsdp2_compiled_full": (2, 2, {**COMPILED, "activation_checkpoint__mode": "full"}),
    "fsdp2_accumulated": (
        2,
        2,
        {"training__local_batch_size": 2, "training__global_batch_size": GLOBAL_BATCH},
    ),
    "ddp2": (2, 2, DDP),
    "tp2": (2, 1, {"parallelism__tensor_parallel_degree": 2}),
    "pp2": (
        2,
        1,
        {
            "parallelism__pipeline_parallel_degree": 2,
            "parallelism__pipeline_parallel_microbatch_size": 4,
        },
    ),
    "hsdp2x2": (4, 4, {"parallelism__data_parallel_replicate_degree": 2}),
    "fsdp2_tp2": (4, 2, {"parallelism__tensor_parallel_degree": 2}),
}

Statistics = dict[str, dict[str, np.ndarray]]


def statistics_of_first_step(folder, name, num_readers, settings) -> Statistics:
    """What the taps measured, added up over the ranks, with a validation pass in between."""
    batch = {
        "training__local_batch_size": GLOBAL_BATCH // num_readers,
        "training__seq_len": LENGTH,
        "training__steps": 1,
        "validation__local_batch_size": GLOBAL_BATCH // num_readers,
        "validation__enable": True,
    }
    found = {}
    with trainer_of(text_run(folder, name, **{**batch, **settings})) as trainer:
        layers = [layer for part in trainer.model_parts for layer in tap(part)]
        trainer.train()
        check_counts(layers)
        for layer in layers:
            sums = reduced(layer)
            if settings is DDP:
                for value in sums.values():
                    dist.all_reduce(value)
            found[layer.name] = {
                "input": sums["input_sum"].numpy(),
                "output": (sums["output_sum"] / layer.sharding.gradient_divisor).numpy(),
            }
    return found


def statistics_of_layouts(folder, layouts) -> dict[str, Statistics]:
    found = {}
    for name in layouts:
        _, num_readers, settings = LAYOUTS.get(name, (1, 1, {}))
        found[name] = statistics_of_first_step(folder, name, num_readers, settings)
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """For each layout, what each rank measured."""
    folder = tmp_path_factory.mktemp("statistics")
    write_text(folder)
    found: dict[str, list[Statistics]] = {}
    for world_size in (1, 2, 4):
        layouts = [name for name, (size, *_) in LAYOUTS.items() if size == world_size]
        layouts = ["one", *layouts] if world_size == 1 else layouts
        by_rank = run_on_ranks(world_size, statistics_of_layouts, folder, layouts)
        found |= {name: [rank[name] for rank in by_rank] for name in layouts}
    return found


def test_every_linear_layer_of_the_transformer_sees_every_token(measured):
    (one,) = measured["one"]
    assert len(one) == 4 * 7 + 1
    assert list(one)[:2] == ["layers.0.attention.wq", "layers.0.attention.wk"]
    assert {statistics["input"][-1] for statistics in one.values()} == {NUM_ROWS}
    assert all(statistics["output"].any() for statistics in one.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_are_those_of_one_rank(measured, layout):
    (one,) = measured["one"]
    seen = set()
    for rank in measured[layout]:
        seen |= set(rank)
        for name, statistics in rank.items():
            for kind, value in statistics.items():
                scale = np.abs(one[name][kind]).max()
                np.testing.assert_allclose(value, one[name][kind], rtol=1e-4, atol=1e-4 * scale)
    assert seen == set(one)


def test_resnet_convolutions_sum_their_patches_and_gradients():
    torch.manual_seed(0)
    model = ResNet(ResNetArgs(depth=50, num_classes=5, zero_init_residual=False)).double()
    model.init_weights()
    images, labels = torch.randn(3, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 3, 1])
    plain = copy.deepcopy(model)
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in plain.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(_keep(name, kept))
    functional.cross_entropy(plain(images), labels).backward()
    layers = tap(model)
    functional.cross_entropy(model(images), labels).backward()
    assert len(layers) == 54
    for layer in layers:
        inputs, output = kept[layer.name]
        assert output.grad is not None
        if isinstance(layer.module, nn.Conv2d):
            conv = layer.module
            assert isinstance(conv.padding, tuple)
            patches = functional.unfold(
                inputs, conv.kernel_size, conv.dilation, conv.padding, conv.stride
            )
            total, grad = patches.sum((0, 2)), output.grad.sum((0, 2, 3))
            num_rows = output.numel() // conv.out_channels
        else:
            total, grad, num_rows = inputs.sum(0), output.grad.sum(0), len(inputs)
        torch.testing.assert_close(layer.input_sum[:-1], total)
        torch.testing.assert_close(layer.output_sum, grad, rtol=1e-7, atol=1e-12)
        assert layer.input_sum[-1] == num_rows


def _keep(name, kept):
    def keep(module, inputs, output):
        output.retain_grad()
        kept[name] = (inputs[0].detach(), output)

    return keep
