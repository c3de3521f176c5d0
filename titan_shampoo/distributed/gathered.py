"""State as torch's own functions gather and scatter it: the same keys on every rank.

A block's state is kept by its owner alone, which torch would take for a replica. The copies made
here are spread over the ranks that hold the parameter, by rows of a DTensor on its mesh. Where the
parameter is a plain tensor (DDP), they are whole on every rank, as torch's own state is there.
"""

import logging
import math
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from titan_shampoo.distributed.state import BlockTensor

logger = logging.getLogger(__name__)

PATIENCE = timedelta(seconds=10)
"""Time after which a rank that waits for others says so."""
LIMIT = timedelta(minutes=10)
"""Time after which it gives up."""


def gathered(blocks: BlockTensor, param: Tensor, replicas: dist.ProcessGroup | None) -> Tensor:
    """A copy of all blocks, as a tensor that torch can gather; called by all ranks of ``param``.

    Args:
        blocks: State of ``param``, of which this rank holds some blocks.
        param: The parameter.
        replicas: Ranks that hold plain tensors as replicas; None for this rank alone.
    """
    whole = blocks.whole(param.device)
    # Bytes are added, not numbers: all but one rank have zeros, and every bit arrives.
    rows = whole.view(len(whole), math.prod(whole.shape[1:])).view(torch.uint8)
    if not isinstance(param, DTensor):
        if replicas is not None and replicas.size() > 1:
            dist.all_reduce(rows, group=replicas)
        return whole
    mesh = param.device_mesh
    if mesh.size() == 1:
        return whole
    spread = DTensor.from_local(rows, mesh, [Partial()] * mesh.ndim, run_check=False)
    for axis in range(1, mesh.ndim + 1):
        placements = [Shard(0)] * axis + [Partial()] * (mesh.ndim - axis)
        spread = spread.redistribute(placements=placements)
    local = spread.to_local().contiguous().view(whole.dtype)
    return DTensor.from_local(
        local.view(len(local), *whole.shape[1:]),
        mesh,
        [Shard(0)] * mesh.ndim,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a saved tensor on this rank; called by all ranks of its mesh if it is a DTensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    kind = tensor.device_mesh.device_type
    return (tensor if tensor.device.type == kind else tensor.to(kind)).full_tensor()


def load_(mine: Tensor, saved: Tensor) -> None:
    """Copy a saved tensor of the same global shape into live memory, whatever its placement.

    Args:
        mine: A plain tensor, a DTensor, or the blocks that this rank owns.
        saved: A plain tensor that is the same on all ranks, or a DTensor.
    """
    if isinstance(mine, BlockTensor):
        whole = whole_tensor(saved)
        for box, chunk in mine.boxes():
            chunk.copy_(whole[box])
    elif isinstance(mine, DTensor) and not isinstance(saved, DTensor):
        whole_here = [Replicate()] * mine.device_mesh.ndim
        saved = DTensor.from_local(saved.to(mine.device), mine.device_mesh, whole_here,
                                   run_check=False)  # fmt: skip
        mine.copy_(saved.redistribute(placements=mine.placements))
    elif isinstance(mine, DTensor):
        mine.copy_(saved)
    else:
        mine.copy_(whole_tensor(saved))


def block_steps(
    owned: Sequence[int], num_blocks: int, step: int, device: torch.device
) -> BlockTensor:
    """The number of each block and the step that its state is of, ``(num_blocks, 2)``.

    Saved beside the state, so that blocks of different steps, or of one rank in the place of
    another's, are found when they are loaded.

    Args:
        owned: Numbers of the blocks of one parameter that this rank owns.
        num_blocks: How many the parameter has.
        step: Steps of the parameter.
        device: Of the parameter.
    """
    table = torch.tensor([[index, step] for index in owned], device=device)
    chunks = {(index, 0): row[None] for index, row in zip(owned, table, strict=True)}
    return BlockTensor((num_blocks, 2), chunks, torch.int64)


def is_of_one_step(block_steps: Tensor, step: int) -> bool:
    """Whether every block is in its place and its state is of ``step``."""
    table = whole_tensor(block_steps).cpu()
    numbers = torch.arange(len(table))
    return torch.equal(table, torch.stack([numbers, torch.full_like(numbers, step)], dim=1))


def await_ranks(groups: Sequence[dist.ProcessGroup], what: str) -> None:
    """Wait until all ranks of all ``groups`` are here; say so where that takes long.

    By the store and not by a collective: a rank that waits in vain leaves no half-made collective.

    Args:
        groups: Whose ranks are awaited, one group after the other.
        what: The call that all ranks must make.

    Raises:
        RuntimeError: If a rank has not come after ten minutes.
    """
    for group in groups:
        # The only way to the store that the process groups were made with.
        store = dist.distributed_c10d._get_default_store()
        key = f"titan_shampoo.{what}.{group.group_name}"
        wanted = -(-store.add(key, 1) // group.size()) * group.size()
        began, pause, is_told = time.monotonic(), 0.001, False
        while (count := store.add(key, 0)) < wanted:
            waited = timedelta(seconds=time.monotonic() - began)
            missing = f"{wanted - count} of {group.size()} ranks have not called {what}"
            advice = "call it on all ranks, and save on one"
            if waited > LIMIT:
                store.add(key, -1)
                raise RuntimeError(f"{missing} within {LIMIT}; {advice}")
            if waited > PATIENCE and not is_told:
                logger.warning("%s yet: waiting for them; %s", missing, advice)
                is_told = True
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
