"""What the taps of one layer measure, against loops over single rows."""

import pytest
import torch
from torch import Tensor, nn

from tests.reference.statistics import conv_rows, linear_rows
from titan_shampoo.statistics import TappedLayer, tap


def loss_of(output: Tensor) -> Tensor:
    """Nonlinear, and not the same for any two values."""
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype)
    return (output.tanh().flatten() * weights).sum()


def measured(module: nn.Module, inputs: Tensor) -> TappedLayer:
    (layer,) = tap(module, moments="both")
    layer.collects_moments = True
    loss_of(module(inputs)).backward()
    return layer


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (2, 2, 2, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_statistics_are_those_of_its_rows(shape, bias):
    torch.manual_seed(0)
    module = nn.Linear(7, 5, bias=bias, dtype=torch.float64)
    inputs = torch.randn(shape, dtype=torch.float64)
    rows, grads = linear_rows(module, inputs, loss_of)
    layer = measured(module, inputs)
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    extended = torch.cat([rows, ones], dim=1)
    torch.testing.assert_close(layer.input_sum, extended.sum(0))
    torch.testing.assert_close(layer.output_sum, grads.sum(0))
    rows = extended if bias else rows
    torch.testing.assert_close(layer.input_moment, sum(torch.outer(x, x) for x in rows))
    torch.testing.assert_close(layer.output_moment, sum(torch.outer(g, g) for g in grads))
    if bias:
        torch.testing.assert_close(layer.output_sum, module.bias.grad)


CONVOLUTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "stride": {"stride": (2, 1), "padding": 1},
    "padding": {"padding": (2, 1)},
    "dilation": {"dilation": (1, 2), "padding": 2},
    "same": {"padding": "same", "dilation": (2, 1), "kernel_size": (2, 3)},
    "valid": {"padding": "valid", "stride": 2},
    "groups": {"groups": 2, "padding": 1},
    "groups-no-bias": {"groups": 2, "bias": False, "stride": 2},
    "depthwise": {"groups": 4, "padding": 1},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "groups": 2},
    "circular": {"padding": (1, 2), "padding_mode": "circular", "stride": 2},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution_statistics_are_those_of_its_patches(options):
    torch.manual_seed(0)
    options = {"kernel_size": (3, 2), "dtype": torch.float64} | options
    module = nn.Conv2d(4, 8, **options)
    images = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    patches, grads = conv_rows(module, images, loss_of)
    layer = measured(module, images)
    mean_over_groups = patches.mean(1)
    torch.testing.assert_close(layer.input_sum[:-1], mean_over_groups.sum(0))
    assert layer.input_sum[-1] == len(patches)
    torch.testing.assert_close(layer.output_sum, grads.sum(0))
    moment = torch.zeros(patches.shape[-1], patches.shape[-1], dtype=torch.float64)
    for row in patches:
        for patch in row:
            moment += torch.outer(patch, patch) / len(row)
    torch.testing.assert_close(layer.output_moment, sum(torch.outer(g, g) for g in grads))
    if module.bias is None:
        torch.testing.assert_close(layer.input_moment, moment)
    else:
        assert layer.input_moment is not None
        torch.testing.assert_close(layer.output_sum, module.bias.grad)
        torch.testing.assert_close(layer.input_moment[:-1, :-1], moment)
        torch.testing.assert_close(layer.input_moment[-1], layer.input_sum)
        torch.testing.assert_close(layer.input_moment[:, -1], layer.input_sum)
