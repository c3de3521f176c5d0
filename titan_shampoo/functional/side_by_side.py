"""Decompositions of stacks of matrices on a CPU: as many at a time as torch has threads.

LAPACK takes the matrices of a stack one after the other and divides each over all threads, which
small ones repay badly: two threads decompose a matrix of 256 rows 1.4 times as fast as one, but two
such matrices 1.7 times as fast.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

SMALL_EXTENT = 512
"""Rows up to which several matrices are taken side by side even by more threads than that."""

Decomposition = Callable[[Tensor], tuple[Tensor, ...]]


def side_by_side(function: Decomposition, matrices: Tensor) -> tuple[Tensor, ...]:
    """``function(matrices)``, in as many parts as there are threads where that is faster.

    One matrix that would be left over has all threads.

    Args:
        function: Takes every matrix of a stack for itself; returns tensors ``(n, ...)``.
        matrices: ``(n, d, d)``.
    """
    threads, count = torch.get_num_threads(), len(matrices)
    is_enough = matrices.shape[-1] <= SMALL_EXTENT or count >= threads
    if matrices.device.type != "cpu" or threads < 2 or count < 2 or not is_enough:
        return tuple(function(matrices))
    left_over = count % threads == 1
    pool = _pool(threads, os.getpid())
    parts = matrices[: count - left_over].tensor_split(min(threads, count - left_over))
    running = [pool.submit(_on_one_thread, function, part) for part in parts]
    wait(running)
    torch.set_num_threads(threads)  # threads yet to come take the number that was set last
    found = [future.result() for future in running]
    if left_over:
        found.append(tuple(function(matrices[-1:])))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def _on_one_thread(function: Decomposition, part: Tensor) -> tuple[Tensor, ...]:
    torch.set_num_threads(1)  # of this thread
    return function(part)


@functools.cache
def _pool(size: int, process: int) -> ThreadPoolExecutor:
    """Threads of ``process``; they do not live in what is forked from it, which has its own."""
    return ThreadPoolExecutor(size, thread_name_prefix="titan_shampoo")
