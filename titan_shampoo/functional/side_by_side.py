"""Decompositions of stacks of matrices on a CPU: as many at a time as torch has threads.

LAPACK takes the matrices of a stack one after the other and divides each over all threads, which
small ones do not repay: two threads decompose a matrix of 256 rows no faster than one, but two such
matrices in the same time. Results then do not depend on the number of threads.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

SMALL_EXTENT = 512
"""Rows up to which a matrix does not repay more than one thread, even where others have no work."""

Decomposition = Callable[[Tensor], tuple[Tensor, ...]]


def side_by_side(function: Decomposition, matrices: Tensor) -> tuple[Tensor, ...]:
    """``function(matrices)``, in as many parts as there are threads where that is faster.

    Args:
        function: Takes every matrix of a stack for itself; returns tensors ``(n, ...)``.
        matrices: ``(n, d, d)``.
    """
    threads = torch.get_num_threads()
    is_enough = matrices.shape[-1] <= SMALL_EXTENT or len(matrices) >= threads
    if matrices.device.type != "cpu" or threads < 2 or not is_enough:
        return tuple(function(matrices))
    pool = _pool(threads, os.getpid())
    parts = matrices.tensor_split(min(threads, len(matrices)))
    running = [pool.submit(_on_one_thread, function, part) for part in parts]
    wait(running)
    torch.set_num_threads(threads)  # threads yet to come take the number that was set last
    return tuple(map(torch.cat, zip(*(future.result() for future in running), strict=True)))


def _on_one_thread(function: Decomposition, part: Tensor) -> tuple[Tensor, ...]:
    torch.set_num_threads(1)  # of this thread
    return function(part)


@functools.cache
def _pool(size: int, process: int) -> ThreadPoolExecutor:
    """Threads of ``process``; they do not live in what is forked from it, which has its own."""
    return ThreadPoolExecutor(size, thread_name_prefix="titan_shampoo")
