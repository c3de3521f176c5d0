"""Residual networks for images (He et al. 2016), with torchvision's names and shapes.

Equal names allow weights to be exchanged with torchvision both ways. As there, a bottleneck has its
stride in the 3x3 convolution. ``small_stem`` starts with one 3x3 convolution of stride 1 and no
pooling, for images of about 32x32. A model is built first and filled by ``init_weights`` later, so
that it can be built on the meta device.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["DEPTHS", "BatchNorm2d", "ResNet", "ResNetArgs", "flops_per_image", "num_parameters"]


@dataclass(slots=True)
class ResNetArgs:
    """The shape of a residual network."""

    depth: Literal[18, 20, 34, 50, 101] = 50
    """Number of layers with weights; 20 is the narrow network for images of 32x32."""

    num_classes: int = 1000
    """Outputs of the last layer."""

    small_stem: bool = False
    """Start at full resolution, for images of about 32x32."""

    channels_last: bool = False
    """Use the memory format that GPUs with tensor cores prefer, in all layers."""

    zero_init_residual: bool = True
    """Start every residual block as the identity (Goyal et al. 2017, section 5.1)."""


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm in the precision of its running statistics, for inputs of any precision.

    Mixed precision passes its parameters in bfloat16, which CPUs cannot combine with running
    statistics in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``, ``(n, channels, h, w)``; the result has its dtype."""
        assert self.running_mean is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        dtype = self.running_mean.dtype
        return nn.functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight.to(dtype),
            self.bias.to(dtype),
            self.training,
            self.momentum,
            self.eps,
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        """Map ``in_channels`` to ``width`` channels at ``1 / stride`` of the resolution."""
        super().__init__()
        self.conv1 = _conv(in_channels, width, kernel_size=3, stride=stride)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = _conv(width, width, kernel_size=3)
        self.bn2 = BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The layer that ends the residual branch."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """``relu(residual(x) + shortcut(x))``, ``(n, width, h / stride, w / stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        """Map ``in_channels`` to ``4 * width`` channels at ``1 / stride`` of the resolution."""
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = _conv(in_channels, width, kernel_size=1)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = _conv(width, width, kernel_size=3, stride=stride)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = _conv(width, out_channels, kernel_size=1)
        self.bn3 = BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The layer that ends the residual branch."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """``relu(residual(x) + shortcut(x))``, ``(n, 4 * width, h / stride, w / stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


Block = type[BasicBlock] | type[Bottleneck]


class Shape(NamedTuple):
    """Blocks and width of a network of one depth."""

    block: Block
    blocks: tuple[int, ...]
    """Number of blocks in each stage; a stage halves the resolution and doubles the width."""
    width: int = 64
    """Width of the first stage."""


DEPTHS: dict[int, Shape] = {
    18: Shape(BasicBlock, (2, 2, 2, 2)),
    20: Shape(BasicBlock, (3, 3, 3), width=16),
    34: Shape(BasicBlock, (3, 4, 6, 3)),
    50: Shape(Bottleneck, (3, 4, 6, 3)),
    101: Shape(Bottleneck, (3, 4, 23, 3)),
}
"""He et al. 2016, table 1; depth 20 is from section 4.2, but projects where the width changes."""


class ResNet(nn.Module):
    """Class scores of images."""

    def __init__(self, model_args: ResNetArgs) -> None:
        """Build the network; ``init_weights`` fills it.

        Raises:
            ValueError: If there is no network of this depth.
        """
        super().__init__()
        if model_args.depth not in DEPTHS:
            raise ValueError(f"depth: got {model_args.depth}, want one of {sorted(DEPTHS)}")
        self.model_args = model_args
        shape = DEPTHS[model_args.depth]
        width = shape.width
        if model_args.small_stem:
            self.conv1 = _conv(3, width, kernel_size=3)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = _conv(3, width, kernel_size=7, stride=2)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.bn1 = BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        for number in range(len(shape.blocks)):
            self.add_module(f"layer{number + 1}", _stage(shape, number))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        last_width = width * 2 ** (len(shape.blocks) - 1)
        self.fc = nn.Linear(last_width * shape.block.expansion, model_args.num_classes)

    @property
    def stages(self) -> list[nn.Module]:
        """One module per resolution, in order."""
        return [module for name, module in self.named_children() if name.startswith("layer")]

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``(n, num_classes)`` of ``images``, ``(n, 3, h, w)``."""
        if self.model_args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            x = stage(x)
        return self.fc(self.avgpool(x).flatten(1))

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fill all parameters and buffers, without use of their old values.

        Convolutions: normal with variance ``2 / fan_out`` (He et al. 2015). Batch norm: the
        identity, or zero at the end of a residual branch. Last layer: as in ``nn.Linear``.

        Args:
            buffer_device: Device for the buffers; None for their present one.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                _place_buffers(module, buffer_device)
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                module.reset_parameters()
        if self.model_args.zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    nn.init.zeros_(module.last_norm.weight)


def num_parameters(model: nn.Module) -> int:
    """Number of trained scalars of ``model``; global counts for DTensors."""
    return sum(param.numel() for param in model.parameters())


def flops_per_image(args: ResNetArgs, image_size: int) -> int:
    """Floating-point operations of forward and backward for one square image.

    Counts convolutions and the last layer, a multiply-add as two, and the backward pass as twice
    the forward.
    """
    with torch.device("meta"):
        model = ResNet(args)
        image = torch.empty(1, 3, image_size, image_size)
    forward = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal forward
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        # A weight is used once for each output value of its row.
        forward += 2 * layer.weight.numel() * output.numel() // layer.weight.shape[0]

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model.eval()(image)
    return 3 * forward


def _conv(in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the resolution, but for its stride; batch norm adds the bias."""
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=False,
    )


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """A projection if the shape changes; None for the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    projection = _conv(in_channels, out_channels, kernel_size=1, stride=stride)
    return nn.Sequential(projection, BatchNorm2d(out_channels))


def _stage(shape: Shape, number: int) -> nn.Sequential:
    """The blocks of one resolution; all stages but the first halve it at their start."""
    block, width = shape.block, shape.width * 2**number
    out_channels = width * block.expansion
    in_channels, stride = (out_channels // 2, 2) if number else (width, 1)
    first = block(in_channels, width, stride)
    others = [block(out_channels, width, 1) for _ in range(shape.blocks[number] - 1)]
    return nn.Sequential(first, *others)


def _place_buffers(module: nn.BatchNorm2d, device: torch.device | None) -> None:
    """Move the buffers of ``module`` to ``device``; their values are overwritten later."""
    if device is None:
        return
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, torch.empty_like(buffer, device=device))
