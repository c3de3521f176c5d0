"""Initial weights that do not depend on the sharding of the model.

DTensor has no random number tracker on CPU meshes: every rank would draw the same numbers for its
own shard. Each random in-place operation of the initialization therefore draws the *whole* tensor
and keeps the part that this rank stores. The generator is seeded by the run's seed, the parameter's
name and the number of earlier draws for it. One rank, DDP, FSDP2, HSDP, tensor and pipeline
parallel start from the same weights. The draws are made on the CPU, so GPUs agree too, at the price
of one CPU copy of the largest parameter at a time.
"""

import functools
import hashlib
from collections import Counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from titan_shampoo.recognition import without_wrappers


class Initializable(Protocol):
    """A model that fills its own parameters and buffers."""

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fill every parameter and buffer."""


def initialize_alike(model: nn.Module, seed: int) -> None:
    """Make ``model.init_weights`` give the same weights on every mesh.

    Args:
        model: A model with ``init_weights``; sharded already, or a part of a pipeline.
        seed: The run's seed, the same on all ranks.
    """
    init_weights = model.init_weights
    assert callable(init_weights)

    @functools.wraps(init_weights)
    def init_weights_alike(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 (passed on)
        with DrawWhole(model, seed):
            init_weights(*args, **kwargs)

    model.init_weights = init_weights_alike


class DrawWhole(TorchDispatchMode):
    """Random in-place operations draw the whole tensor and keep the part stored here.

    Args:
        model: The model with the names of parameters and buffers. Tensors without a name
            (temporaries) share one sequence of draws.
        seed: The same on all ranks.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        """Map the tensors of ``model`` to their names."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._seed = seed
        self._names = WeakIdKeyDictionary()
        self._num_draws: Counter[str] = Counter()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names[tensor] = unwrapped_name(name)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (whatever the operation returns)
        """Replace random in-place operations; run all others unchanged."""
        kwargs = kwargs or {}
        if _is_random_in_place(func):
            return self._draw_(func, args, kwargs)
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and args[0] in self._names:
            # Low-precision parameters are drawn in a float32 copy, which gets their name.
            self._names[result] = self._names[args[0]]
        return result

    def _draw_(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        tensor = args[0]
        assert isinstance(tensor, Tensor)
        name = self._names.get(tensor, "")
        generator = torch.Generator("cpu").manual_seed(
            _draw_seed(self._seed, name, self._num_draws[name])
        )
        self._num_draws[name] += 1
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        func(whole, *args[1:], **{**kwargs, "generator": generator})
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(local_part(whole, tensor))
        else:
            tensor.copy_(whole)
        return tensor


def unwrapped_name(name: str) -> str:
    """Return the parameter's name in the bare model, without the parts of wrappers."""
    return ".".join(part for part in without_wrappers(name).split(".") if part != "module")


def local_part(whole: Tensor, like: DTensor) -> Tensor:
    """Return the part of ``whole`` that this rank stores of ``like``.

    Args:
        whole: The global tensor, of ``like``'s global shape.
        like: Placed by any mix of ``Replicate``, ``Shard`` and ``_StridedShard``.

    Raises:
        ValueError: If the result does not have the shape of ``like``'s local tensor.
    """
    mesh, placements = like.device_mesh, like.placements
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    strided = [i for i, p in enumerate(placements) if isinstance(p, _StridedShard)]
    plain = [i for i, p in enumerate(placements) if isinstance(p, Shard) and i not in strided]
    part = whole
    # A strided shard cuts the rest that later axes leave (tensor parallel first, then FSDP).
    for axis in (*plain, *reversed(strided)):
        dim = placements[axis].dim  # type: ignore[attr-defined]
        start, length = _chunk(part.shape[dim], mesh.size(axis), coordinate[axis])
        part = part.narrow(dim, start, length)
    wanted = like.to_local().shape
    if part.shape != wanted:
        raise ValueError(
            f"a tensor of shape {tuple(like.shape)} placed by {placements} has the local shape "
            f"{tuple(wanted)}, where {tuple(part.shape)} was expected: an unknown layout"
        )
    return part


def _chunk(size: int, num_chunks: int, index: int) -> tuple[int, int]:
    """Return start and length of a chunk of ``torch.chunk``; the last may be empty."""
    length = -(-size // num_chunks)
    start = min(index * length, size)
    return start, min(length, size - start)


def _draw_seed(seed: int, name: str, draw: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _is_random_in_place(func: torch._ops.OpOverload) -> bool:
    random = torch.Tag.nondeterministic_seeded in func.tags
    return random and func._schema.name.endswith("_")
