"""The rows of a layer, one by one: the input and the output gradient of each, in float64."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]


def linear_rows(layer: nn.Linear, inputs: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Inputs ``(rows, d_in)`` and output gradients ``(rows, d_out)``."""
    output = torch.zeros(*inputs.shape[:-1], layer.out_features, dtype=inputs.dtype)
    positions = list(itertools.product(*(range(size) for size in inputs.shape[:-1])))
    for position in positions:
        for channel in range(layer.out_features):
            output[position][channel] = (inputs[position] * layer.weight[channel]).sum()
        if layer.bias is not None:
            output[position] += layer.bias
    output = output.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(output), output)
    return (
        torch.stack([inputs[position] for position in positions]),
        torch.stack([grad[position] for position in positions]),
    )


def conv_rows(conv: nn.Conv2d, images: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Patches ``(rows, groups, d_in)`` and output gradients ``(rows, d_out)``."""
    output_shape = conv(images).shape
    num, _, height, width = output_shape
    places = list(itertools.product(range(num), range(height), range(width)))
    patches = torch.stack([_patch(conv, images[n], y, x) for n, y, x in places])
    output = torch.zeros(output_shape, dtype=images.dtype)
    per_group = conv.out_channels // conv.groups
    for (n, y, x), patch in zip(places, patches, strict=True):
        for channel in range(conv.out_channels):
            weight = conv.weight[channel].flatten()
            output[n, channel, y, x] = (weight * patch[channel // per_group]).sum()
            if conv.bias is not None:
                output[n, channel, y, x] += conv.bias[channel]
    torch.testing.assert_close(output, conv(images))  # or these are not its patches
    output = output.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(output), output)
    return patches, torch.stack([grad[n, :, y, x] for n, y, x in places])


def _patch(conv: nn.Conv2d, image: Tensor, y: int, x: int) -> Tensor:
    """What the weight meets at output position ``(y, x)``, ``(groups, d_in)``."""
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    before = _padding_before(conv)
    values = torch.zeros(conv.in_channels, *kernel, dtype=image.dtype)
    for i, j in itertools.product(range(kernel[0]), range(kernel[1])):
        row = _index(y * stride[0] + i * dilation[0] - before[0], image.shape[1], conv.padding_mode)
        col = _index(x * stride[1] + j * dilation[1] - before[1], image.shape[2], conv.padding_mode)
        if row is not None and col is not None:
            values[:, i, j] = image[:, row, col]
    return values.reshape(conv.groups, -1)


def _padding_before(conv: nn.Conv2d) -> tuple[int, int]:
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        height, width = (
            dilation * (size - 1) // 2
            for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True)
        )
        return height, width
    assert isinstance(conv.padding, tuple)
    return conv.padding[0], conv.padding[1]


def _index(position: int, size: int, mode: str) -> int | None:
    """Which pixel a position outside of the image means; None for zero."""
    if 0 <= position < size:
        return position
    if mode == "circular":
        return position % size
    if mode == "replicate":
        return min(max(position, 0), size - 1)
    if mode == "reflect":
        return -position if position < 0 else 2 * (size - 1) - position
    return None
