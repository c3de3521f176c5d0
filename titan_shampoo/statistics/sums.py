"""Sums over the rows of a layer, which its taps add up in every backward pass.

A row is one application of the weight: a token of a linear layer, one position of one sample of a
convolution. All sums are formed in float32 (float64 for float64 parameters), whatever the precision
of the activations.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Patches(NamedTuple):
    """The patches of a convolution's input; each is the input of one row."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    """Left, right, top, bottom."""
    padding_mode: str
    groups: int


def patches_of(conv: nn.Conv2d) -> Patches:
    """The patches of ``conv``."""
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    return Patches(
        _pair(conv.kernel_size),
        _pair(conv.stride),
        _pair(conv.dilation),
        (left, right, top, bottom),
        "constant" if conv.padding_mode == "zeros" else conv.padding_mode,
        conv.groups,
    )


def input_sum(input: Tensor, num_rows: Tensor, patches: Patches | None) -> Tensor:
    """``[sum of x; number of rows]`` over the rows ``x`` of a layer's input, ``(d_in + 1,)``.

    With groups, the input of a row is the mean over the groups.

    Args:
        input: ``(..., d_in)``, or images ``(n, channels, h, w)`` of a convolution.
        num_rows: Number of rows, a 0-dim tensor with the dtype of the result.
        patches: Patches of a convolution; None for a linear layer.
    """
    if patches is None:
        total = _sum_of_rows(input, num_rows.dtype)
    else:
        sums = _sum_of_patches(_images(input), num_rows.dtype, patches)
        total = sums.reshape(patches.groups, -1).mean(0)
    return torch.cat([total, num_rows[None]])


def output_sum(grad: Tensor, dtype: torch.dtype, patches: Patches | None) -> Tensor:
    """Sum over the rows of the gradients at a layer's output, ``(d_out,)``: its bias gradient.

    Args:
        grad: ``(..., d_out)``, or ``(n, d_out, h, w)`` of a convolution.
        dtype: Dtype of the result.
        patches: Patches of a convolution; None for a linear layer.
    """
    if patches is None:
        return _sum_of_rows(grad, dtype)
    return _sum_of_pixels(_images(grad), dtype)


def input_moment(
    input: Tensor, dtype: torch.dtype, patches: Patches | None, *, with_bias: bool
) -> Tensor:
    """Sum of ``x x^T`` over the rows ``x``, ``(d_in, d_in)``; with groups, the mean over them.

    Args:
        input: As in ``input_sum``.
        dtype: Dtype of the result.
        patches: Patches of a convolution; None for a linear layer.
        with_bias: True for rows ``[x; 1]`` and a result ``(d_in + 1, d_in + 1)``.
    """
    if patches is None:
        rows, num_groups = input.reshape(-1, input.shape[-1]).to(dtype), 1
    else:
        unfolded = _unfolded(_images(input).to(dtype), patches)
        rows, num_groups = unfolded.transpose(2, 3).flatten(0, 2), patches.groups
    moment = rows.T @ rows
    if with_bias:
        sums = rows.sum(0)
        corner = sums.new_full((1,), rows.shape[0])
        moment = torch.cat(
            [torch.cat([moment, sums[None]]), torch.cat([sums, corner])[:, None]], dim=1
        )
    return moment / num_groups if num_groups > 1 else moment


def output_moment(grad: Tensor, dtype: torch.dtype, patches: Patches | None) -> Tensor:
    """The sum of ``g g^T`` over the rows ``g``, ``(d_out, d_out)``; arguments as ``output_sum``."""
    if patches is not None:
        grad = _images(grad).permute(0, 2, 3, 1)
    rows = grad.reshape(-1, grad.shape[-1]).to(dtype)
    return rows.T @ rows


def num_rows(grad: Tensor, patches: Patches | None) -> int:
    """The number of rows behind the output gradient ``grad``."""
    shape = grad.shape
    return math.prod(shape[:-1] if patches is None else (*shape[:-3], *shape[-2:]))


def _sum_of_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over all dims but the last, ``(d,)``."""
    return rows.reshape(-1, rows.shape[-1]).sum(0, dtype=dtype)


def _sum_of_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over all pixels of all ``images``, ``(channels,)``."""
    # Two steps: torch reduces trailing dims alone up to twice as fast as leading ones with them.
    return images.sum((2, 3), dtype=dtype).sum(0)


def _sum_of_patches(images: Tensor, dtype: torch.dtype, patches: Patches) -> Tensor:
    """The sum over the patches of all ``images``, ``(channels, kernel height, kernel width)``.

    Patches are linear in the image, so those of the summed image are summed: first the rows of
    pixels that each row of the kernel meets, then the columns.
    """
    (height, width), stride, dilation, padding, mode, _ = patches
    if (height, width) == stride == (1, 1) and not any(padding):
        return _sum_of_pixels(images, dtype)[:, None, None]
    image = functional.pad(images.sum(0, dtype=dtype), padding, mode=mode)
    for dim, size in enumerate((height, width)):
        span = dilation[dim] * (size - 1) + 1
        # unfold removes the dim and appends one for the kernel: width is then dim 1.
        image = image.unfold(1, span, stride[dim])[..., :: dilation[dim]].sum(1)
    return image


def _unfolded(images: Tensor, patches: Patches) -> Tensor:
    """The patches of ``images``, ``(n, groups, d_in, positions)``."""
    padded = functional.pad(images, patches.padding, mode=patches.padding_mode)
    columns = functional.unfold(
        padded, patches.kernel_size, dilation=patches.dilation, stride=patches.stride
    )
    return columns.unflatten(1, (patches.groups, -1))


def _images(tensor: Tensor) -> Tensor:
    """``tensor`` with its batch dim, which convolutions allow to be left out."""
    return tensor if tensor.dim() == 4 else tensor[None]


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    height, width = sizes
    return height, width


class RowsOfExperts:
    """The rows of a product by one matrix of a stack or by all of them, and their experts.

    Args:
        input: Rows of one expert, ``(..., d_in)``. Or the rows of all experts: sorted by expert
            ``(n, d_in)`` with ``ends``, equally many for each ``(..., experts, n, d_in)``, or the
            same for each ``(n, d_in)``. Rows of zeros are padding.
        ends: End of the rows of each expert, ``(experts,)``; rows after the last end may hold
            anything.
        num_experts: None for the rows of one expert.
        dtype: Dtype of the sums.
    """

    def __init__(
        self, input: Tensor, ends: Tensor | None, num_experts: int | None, dtype: torch.dtype
    ) -> None:
        self.ends, self.num_experts, self.dtype = ends, num_experts, dtype
        self._owners: Tensor | None = None
        if ends is not None:
            positions = torch.arange(len(input), dtype=ends.dtype, device=ends.device)
            self._owners = torch.searchsorted(ends, positions, right=True)
        self.count = self.sums((input != 0).any(-1, keepdim=True)).squeeze(-1)
        """Number of rows without padding, 0-dim or ``(experts,)``."""

    def sums(self, values: Tensor) -> Tensor:
        """Sums of ``values`` over the rows of each expert, ``(d,)`` or ``(experts, d)``.

        Args:
            values: One vector for each row, ``(..., d)``.
        """
        if self.num_experts is None:
            return _sum_of_rows(values, self.dtype)
        if self._owners is None:
            batched = values[None] if values.dim() == 2 else values
            dims = [dim for dim in range(batched.dim() - 1) if dim != batched.dim() - 3]
            total = batched.sum(dims, dtype=self.dtype)
            return total.expand(self.num_experts, -1)
        experts = torch.arange(self.num_experts, device=values.device)
        members = (self._owners == experts[:, None]).to(self.dtype)
        behind = self._owners == self.num_experts
        # Not index_add_, whose order of addition on accelerators differs from run to run.
        return members @ values.masked_fill(behind[:, None], 0).to(self.dtype)
