"""State in the form that torch's state-dict functions gather and scatter, equal keys on all ranks.

Only its owner keeps a block's state, and torch would take that for one of many replicas. The copies
made here are spread over the ranks that hold the parameter, as rows of a DTensor on its mesh. For a
plain tensor (DDP), every rank gets the whole copy, as in torch's own state.
"""

import logging
import math
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

logger = logging.getLogger(__name__)

PATIENCE = timedelta(seconds=10)
"""Time after which a waiting rank logs a warning."""
LIMIT = timedelta(minutes=10)
"""Time after which a waiting rank gives up."""


def gathered(
    blocks: Tensor,
    places: Sequence[int],
    count: int,
    param: Tensor,
    replicas: dist.ProcessGroup | None,
) -> Tensor:
    """A copy of all blocks, ``(count, ...)``, that torch can gather; every rank must call it.

    Args:
        blocks: Blocks that this rank owns, ``(len(places), ...)``.
        places: Their positions among all blocks.
        count: Number of blocks on all ranks.
        param: The parameter of the blocks.
        replicas: Ranks that hold plain tensors as replicas; None for this rank alone.
    """
    whole = blocks.new_zeros(count, *blocks.shape[1:])
    whole[list(places)] = blocks
    # The sum of bytes keeps every bit: all ranks but the owner have zeros.
    rows = whole.view(count, math.prod(whole.shape[1:])).view(torch.uint8)
    if not isinstance(param, DTensor):
        if replicas is not None and replicas.size() > 1:
            dist.all_reduce(rows, group=replicas)
        return whole
    mesh = param.device_mesh
    if mesh.size() == 1:
        return whole
    # Only one axis, the longest: torch gathers rows cut unevenly over two axes incorrectly.
    widest = max(range(mesh.ndim), key=lambda axis: mesh.shape[axis])
    placements: list[Placement] = [Partial()] * mesh.ndim
    spread = DTensor.from_local(rows, mesh, placements, run_check=False)
    for axis in sorted(range(mesh.ndim), key=lambda axis: axis != widest):
        placements[axis] = Shard(0) if axis == widest else Replicate()
        spread = spread.redistribute(placements=placements)
    local = spread.to_local().contiguous().view(whole.dtype)
    return DTensor.from_local(
        local.view(len(local), *whole.shape[1:]),
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a saved tensor on this rank; a collective over its mesh if it is a DTensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    kind = tensor.device_mesh.device_type
    here = tensor if tensor.device.type == kind else tensor.to(kind)  # offloaded by torch
    assert isinstance(here, DTensor), "moving a DTensor does not make it plain"
    return here.full_tensor()


def load_(mine: Tensor, saved: Tensor, places: Sequence[int] | None = None) -> None:
    """Copy a saved tensor into live memory, whatever its placement.

    Args:
        mine: A plain tensor, a DTensor, or the blocks that this rank owns.
        saved: A DTensor, or a plain tensor: the whole or this rank's blocks.
        places: Positions of this rank's blocks among all of them.
    """
    if isinstance(mine, DTensor) and not isinstance(saved, DTensor):
        whole_here = [Replicate()] * mine.device_mesh.ndim
        everywhere = DTensor.from_local(saved.to(mine.device), mine.device_mesh, whole_here,
                                   run_check=False)  # fmt: skip
        saved = everywhere.redistribute(placements=mine.placements)
    if isinstance(mine, DTensor):
        mine.copy_(saved)
        return
    whole = whole_tensor(saved)
    mine.copy_(whole if places is None or whole.shape == mine.shape else whole[list(places)])


def await_ranks(groups: Sequence[dist.ProcessGroup], what: str) -> None:
    """Wait until all ranks of all ``groups`` have called; warn if that takes long.

    Uses the store instead of a collective: a timeout then leaves no collective half done.

    Args:
        groups: Process groups to wait for, one after the other.
        what: Name of the call that all ranks must make.

    Raises:
        RuntimeError: If a rank has not come after ten minutes.
    """
    for group in groups:
        # torch has no public access to the store of the process groups.
        store = dist.distributed_c10d._get_default_store()
        key = f"titan_shampoo.{what}.{group.group_name}"
        wanted = -(-store.add(key, 1) // group.size()) * group.size()
        began, pause, is_warned = time.monotonic(), 0.001, False
        while (count := store.add(key, 0)) < wanted:
            waited = timedelta(seconds=time.monotonic() - began)
            missing = f"{wanted - count} of {group.size()} ranks have not called {what}"
            advice = "call it on all ranks, and save on one"
            if waited > LIMIT:
                store.add(key, -1)
                raise RuntimeError(f"{missing} within {LIMIT}; {advice}")
            if waited > PATIENCE and not is_warned:
                logger.warning("%s yet: waiting for them; %s", missing, advice)
                is_warned = True
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
