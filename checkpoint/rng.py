"""Random generators of every rank as global tensors: one row per rank, no rank in a key.

On the same number of ranks, each rank loads its row. On another number the rows have no owner: all
generators are then seeded from the run's seed, the step and the rank.
"""

import random
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint.manifest import GENERATORS_PREFIX
from titan_shampoo.distributed.state import BlockTensor


def rng_rows(rank: int, world_size: int) -> dict[str, Tensor]:
    """Present state of torch's, Python's, numpy's and the device's generators.

    Returns:
        ``rng.<name>``, each ``(world_size, length)``; this rank holds its row.
    """
    rows = {"torch": torch.get_rng_state(), "python": _python_state(), "numpy": _numpy_state()}
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.accelerator.is_available():
        rows[accelerator.type] = torch.get_device_module(accelerator).get_rng_state()
    return {
        GENERATORS_PREFIX + name: BlockTensor(
            (world_size, len(row)), {(rank, 0): row[None]}, row.dtype
        )
        for name, row in rows.items()
    }


def problem(rows: Mapping[str, Tensor]) -> str | None:
    """Try loaded rows of :func:`rng_rows` on unused generators.

    Returns:
        A line about the first row that is rejected; None if there is none.
    """
    for key, row in _states(rows):
        try:
            if key == "python":
                random.Random().setstate(_python_tuple(row.tolist()))
            elif key == "numpy":
                np.random.RandomState().set_state(_numpy_tuple(row.tolist()))
            else:
                torch.Generator("cpu" if key == "torch" else key).set_state(row)
        except (RuntimeError, ValueError, TypeError, OverflowError, struct.error) as error:
            return (
                f"{GENERATORS_PREFIX}{key}: no state of a generator: {str(error).splitlines()[0]}"
            )
    return None


def restore(rows: Mapping[str, Tensor]) -> None:
    """Set the generators to loaded rows of :func:`rng_rows`."""
    for name, row in _states(rows):
        if name == "torch":
            torch.set_rng_state(row)
        elif name == "python":
            random.setstate(_python_tuple(row.tolist()))
        elif name == "numpy":
            np.random.set_state(_numpy_tuple(row.tolist()))
        else:
            torch.get_device_module(name).set_rng_state(row)


def _states(rows: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and state of each generator of this rank."""
    for key, tensor in rows.items():
        assert isinstance(tensor, BlockTensor)
        (chunk,) = tensor.chunks.values()
        yield key.removeprefix(GENERATORS_PREFIX), chunk[0].clone()


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed all generators from numbers that are equal after every resume."""
    words = np.random.SeedSequence((seed, step, rank)).generate_state(3, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def _python_state() -> Tensor:
    _, words, gauss = random.getstate()
    return torch.tensor([*words, *_optional_bits(gauss)])


def _python_tuple(row: list[int]) -> tuple[Any, ...]:
    return 3, tuple(row[:-2]), _optional_float(row[-2:])


def _numpy_state() -> Tensor:
    state: Any = np.random.get_state()
    _, words, position, has_gauss, gauss = state
    bits = _optional_bits(gauss if has_gauss else None)
    return torch.tensor([*(int(word) for word in words), position, *bits])


def _numpy_tuple(row: list[int]) -> tuple[Any, ...]:
    gauss = _optional_float(row[-2:])
    words = np.array(row[:-3], dtype=np.uint32)
    return "MT19937", words, row[-3], int(gauss is not None), gauss or 0.0


def _optional_bits(value: float | None) -> tuple[int, int]:
    """A float, or None, as two integers."""
    return (0, 0) if value is None else (1, struct.unpack("<q", struct.pack("<d", value))[0])


def _optional_float(bits: list[int]) -> float | None:
    return struct.unpack("<d", struct.pack("<q", bits[1]))[0] if bits[0] else None
