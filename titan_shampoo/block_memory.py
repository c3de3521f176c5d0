"""Memory layout of blocks: the two longest dims outside, short ones between them.

A block of a convolution, ``(out, in, kernel)``, is stored as ``(out, kernel, in)``, like torch's
memory format "channels last". Its products with the large matrices, and the sums of squares behind
them, then need no transpose; row-major blocks would be transposed before and after each. Matrices
and vectors are row-major.
"""

import itertools
from collections.abc import Sequence

from torch import Tensor


def memory_order(shape: Sequence[int]) -> tuple[int, ...]:
    """Dims of a block of ``shape``, the outermost in memory first.

    >>> memory_order((256, 128, 9))
    (0, 2, 1)
    """
    by_length = sorted(range(len(shape)), key=lambda dim: -shape[dim])
    longest = sorted(by_length[:2])
    return (*longest[:1], *sorted(by_length[2:]), *longest[1:])


def memory_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a block of ``shape``."""
    order = memory_order(shape)
    extents = [shape[dim] for dim in order]
    steps = itertools.accumulate(reversed(extents[1:]), lambda a, b: a * b, initial=1)
    of_dim = dict(zip(reversed(order), steps, strict=False))
    return tuple(of_dim[dim] for dim in range(len(shape)))


def as_blocks(memory: Tensor, shape: Sequence[int]) -> Tensor:
    """The blocks in contiguous ``memory``, ``(n, *shape)``, as a view."""
    order = memory_order(shape)
    return from_memory_order(memory.view(-1, *(shape[dim] for dim in order)), order)


def in_memory_order(blocks: Tensor) -> Tensor:
    """Contiguous ``(n, *block)`` with the dims of a block in memory order."""
    return blocks.permute(0, *(1 + dim for dim in memory_order(blocks.shape[1:])))


def from_memory_order(lying: Tensor, order: Sequence[int]) -> Tensor:
    """Inverse of :func:`in_memory_order`, for blocks with dims in ``order``."""
    return lying.permute(0, *(1 + order.index(dim) for dim in range(len(order))))
