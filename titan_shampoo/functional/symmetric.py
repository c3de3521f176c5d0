"""Symmetric matrices of which a staircase is kept: columns in slabs, from the diagonal down.

    1 . . .
    1 2 . .
    1 2 3 .
    1 2 3 4

Four slabs are 5/8 of the matrix, and eight of 1024 rows 9/16, in memory as well as in the
arithmetic of adding products ``U U^T``: each slab takes one dense product, and nothing is packed or
unpacked in a step. Triangles packed element by element would take 1/2, and a pass over all of them
in every step.
"""

import torch
from torch import Tensor

MIN_SLABS = 4
MAX_WIDTH = 128
"""Most columns of a slab: products of wider ones are no faster, and more of the matrix is kept."""
MIN_EXTENT = 128
"""Smaller matrices are kept whole: four small products take longer than a whole one."""
ALIGNMENT = 16
"""Slabs are as wide as a multiple of this, which vector units like."""


def slabs(extent: int) -> tuple[tuple[int, int], ...]:
    """Columns ``[start, stop)`` of each slab of an ``(extent, extent)`` matrix.

    >>> slabs(256)
    ((0, 64), (64, 128), (128, 192), (192, 256))
    >>> slabs(100)
    ((0, 100),)
    """
    if extent < MIN_EXTENT:
        return ((0, extent),)
    width = min(-(-extent // (MIN_SLABS * ALIGNMENT)) * ALIGNMENT, MAX_WIDTH)
    return tuple((start, min(start + width, extent)) for start in range(0, extent, width))


def packed_numel(extent: int) -> int:
    """Elements that are kept of an ``(extent, extent)`` matrix."""
    return sum((extent - start) * (stop - start) for start, stop in slabs(extent))


def slab_views(packed: Tensor, extent: int) -> list[Tensor]:
    """The slabs, ``(n, extent - start, stop - start)`` each, as views.

    Args:
        packed: ``(n, packed_numel(extent))``.
        extent: Rows and columns of a matrix.
    """
    sizes = [(extent - start, stop - start) for start, stop in slabs(extent)]
    parts = packed.split([rows * columns for rows, columns in sizes], dim=-1)
    return [part.unflatten(-1, size) for part, size in zip(parts, sizes, strict=True)]


def unpack(packed: Tensor, extent: int) -> Tensor:
    """The matrices, ``(n, extent, extent)``."""
    views = slab_views(packed, extent)
    if len(views) == 1:
        return views[0]
    matrices = packed.new_empty(*packed.shape[:-1], extent, extent)
    for (start, stop), view in zip(slabs(extent), views, strict=True):
        matrices[..., start:, start:stop] = view
        matrices[..., start:stop, stop:] = view[..., stop - start :, :].mT
    return matrices


def pack(matrices: Tensor) -> Tensor:
    """What is kept of symmetric ``matrices``, ``(n, packed_numel(extent))``."""
    parts = [
        matrices[..., start:, start:stop].flatten(-2) for start, stop in slabs(matrices.shape[-1])
    ]
    return torch.cat(parts, dim=-1)
