"""Merging and cutting of one array, and the three tensor operations on a block, all by numpy.

``blocks_of`` returns writable views, so a block's update is written straight into the weight.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BlockSize = int | tuple[int, int]


def merged_shape(shape: Sequence[int], merge: str, block_size: BlockSize) -> tuple[int, ...]:
    """Shape of one slice (without batch dims) after dropping ones and merging.

    Raises:
        ValueError: An unknown ``merge``, or "paper" with a pair, which the formulas leave open.
    """
    dims = [size for size in shape if size != 1] or [1]
    if merge == "none":
        return tuple(dims)
    if merge == "matrix":
        return (dims[0], math.prod(dims[1:])) if len(dims) > 1 else (dims[0],)
    if merge == "paper" and isinstance(block_size, int):
        merged = [dims[-1]]
        for size in reversed(dims[:-1]):
            if merged[0] * size <= block_size:
                merged[0] *= size
            else:
                merged.insert(0, size)
        return tuple(merged)
    raise ValueError(f"merge = {merge!r} with block_size = {block_size!r}")


def blocks_of(
    array: Array, *, merge: str, block_size: BlockSize, batch_dims: int = 0
) -> Iterator[Array]:
    """Views of the blocks of a contiguous array, the last dim running fastest."""
    merged = merged_shape(array.shape[batch_dims:], merge, block_size)
    first, other = (block_size, block_size) if isinstance(block_size, int) else block_size
    sizes = [first] + [other] * (len(merged) - 1)
    for batch in np.ndindex(*array.shape[:batch_dims]):
        grid = array[(*batch, ...)].reshape(merged)
        starts = [range(0, dim, size) for dim, size in zip(merged, sizes, strict=True)]
        for corner in itertools.product(*starts):
            yield grid[tuple(slice(at, at + n) for at, n in zip(corner, sizes, strict=True))]


def unfold(block: Array, dim: int) -> Array:
    """The block as a matrix ``(d, everything else)`` with ``dim`` in the rows."""
    return np.moveaxis(block, dim, 0).reshape(block.shape[dim], -1)


def contract(block: Array, matrix: Array, dim: int) -> Array:
    """``sum_b matrix[a, b] block[..., b, ...]``: the matrix applied on one dim."""
    return np.moveaxis(np.tensordot(matrix, block, axes=(1, dim)), 0, dim)


def contract_all(
    block: Array, matrices: Sequence[Array], change: Callable[[Array], Array] = lambda m: m
) -> Array:
    """The block with ``change(matrices[k])`` applied on every dim ``k``."""
    for dim, matrix in enumerate(matrices):
        block = contract(block, change(matrix), dim)
    return block
