"""The blocks of a parameter: a grid in global coordinates.

The grid depends on the parameter's shape and the configuration alone, never on a mesh, so that
iterates and checkpoints are equal on every mesh. ``Grid.cut_at`` is the exception: it adds the
edges of shards on request. Merging and blocking follow Shi et al. 2023 (arXiv 2309.06497,
section 3).
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Merge = Literal["matrix", "paper", "none"]


@dataclass(frozen=True, slots=True)
class Grid:
    """A parameter merged into fewer dims and cut into blocks.

    >>> grid = make_grid((512, 256, 3, 3), block_size=1024, merge="matrix")
    >>> grid.merged_shape, grid.counts
    ((512, 2304), (1, 3))
    >>> grid.block_shape((0, 2))
    (512, 256)
    """

    dim_groups: tuple[tuple[int, ...], ...]
    """For each merged dim, the dims of the parameter in it, in order."""
    merged_shape: tuple[int, ...]
    """Extent of each merged dim."""
    edges: tuple[tuple[int, ...], ...]
    """First index of each block along each merged dim, and the end of the last block."""
    batch_dims: int
    """Leading merged dims with one grid per slice (expert stacks)."""
    fingerprint: str = ""
    """Short hash of the edges if they depend on a mesh. It is part of the state keys, so that state
    for other edges is not loaded by mistake."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of blocks along each merged dim."""
        return tuple(len(edges) - 1 for edges in self.edges)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the parameter."""
        return math.prod(self.counts)

    @property
    def order(self) -> int:
        """Number of dims of a block, without batch dims."""
        return len(self.merged_shape) - self.batch_dims

    def positions(self) -> "itertools.product[tuple[int, ...]]":
        """Grid positions of all blocks, row-major: block ``k`` is the ``k``-th."""
        return itertools.product(*map(range, self.counts))

    def block_start(self, position: tuple[int, ...]) -> tuple[int, ...]:
        """First index of a block along each merged dim."""
        return tuple(edges[p] for p, edges in zip(position, self.edges, strict=True))

    def block_extent(self, position: tuple[int, ...]) -> tuple[int, ...]:
        """Extent of a block along each merged dim (1 along batch dims)."""
        return tuple(edges[p + 1] - edges[p] for p, edges in zip(position, self.edges, strict=True))

    def block_shape(self, position: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a block without batch dims."""
        return self.block_extent(position)[self.batch_dims :]

    def cut_at(self, more: Sequence[Iterable[int]]) -> "Grid":
        """The grid with ``more`` edges along each merged dim; itself if nothing is new.

        >>> grid = make_grid((12, 4), block_size=5).cut_at([(0, 6, 12), (0, 4)])
        >>> grid.edges, grid.fingerprint
        (((0, 5, 6, 10, 12), (0, 4)), '66af7fde')
        """
        edges = tuple(
            tuple(sorted({*mine, *others})) for mine, others in zip(self.edges, more, strict=True)
        )
        if edges == self.edges:
            return self
        fingerprint = hashlib.sha256(repr(edges).encode()).hexdigest()[:8]
        return replace(self, edges=edges, fingerprint=fingerprint)


def make_grid(
    shape: tuple[int, ...],
    *,
    block_size: int | tuple[int, int],
    merge: Merge = "matrix",
    batch_dims: int = 0,
) -> Grid:
    """The block grid of a parameter of ``shape``.

    Args:
        shape: Global shape of the parameter.
        block_size: Distance of block edges, in elements; a pair for (first, other) merged dims.
        merge: ``"matrix"``: first dim by all the others. ``"paper"``: from last to first, merge
            the next dim into the current one while the product stays at most ``block_size``.
            ``"none"``: dims stay apart. Dims of size 1 are dropped in every case.
        batch_dims: Leading dims that are neither merged nor cut into ranges: one grid per slice.

    Raises:
        ValueError: If ``batch_dims`` leaves no dim to cut.
    """
    if not 0 <= batch_dims < max(len(shape), 1):
        raise ValueError(f"batch_dims is {batch_dims}, but the parameter has shape {shape}; "
                         f"set batch_dims to at most {max(len(shape) - 1, 0)}")  # fmt: skip
    first, other = (block_size, block_size) if isinstance(block_size, int) else block_size
    batch = [(dim,) for dim in range(batch_dims)]
    groups = batch + _merge(shape, range(batch_dims, len(shape)), merge, max(first, other))
    merged = tuple(math.prod(shape[dim] for dim in group) for group in groups)
    sizes = (1,) * batch_dims + (first,) + (other,) * (len(groups) - batch_dims - 1)
    edges = tuple(
        (*range(0, extent, size), extent) if extent else (0,)
        for extent, size in zip(merged, sizes, strict=True)
    )
    return Grid(tuple(groups), merged, edges, batch_dims)


def _merge(
    shape: tuple[int, ...], dims: range, merge: Merge, threshold: int
) -> list[tuple[int, ...]]:
    """Consecutive dims that become one; a dim of size 1 joins the group before it."""
    kept = [dim for dim in dims if shape[dim] != 1]
    if not kept:
        return [tuple(dims)]
    if merge == "matrix":
        starts = kept[:2]
    elif merge == "none":
        starts = kept
    else:
        starts = _paper_starts(shape, kept, threshold)
    edges = [dims.start, *starts[1:], dims.stop]
    return [tuple(range(a, b)) for a, b in itertools.pairwise(edges)]


def _paper_starts(shape: tuple[int, ...], kept: list[int], threshold: int) -> list[int]:
    """First dim of each merged group under the rule of Shi et al. 2023."""
    starts = [kept[-1]]
    product = shape[kept[-1]]
    for dim in reversed(kept[:-1]):
        if product * shape[dim] <= threshold:
            product *= shape[dim]
            starts[0] = dim
        else:
            product = shape[dim]
            starts.insert(0, dim)
    return starts
