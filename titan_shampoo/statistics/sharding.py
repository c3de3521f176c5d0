"""Mesh axes that cut a layer's rows, inputs and outputs, read off its weight.

Under FSDP2 and HSDP a rank computes with the whole weight and its own rows. Under tensor
parallelism the ranks share the rows and cut the weight: column-wise its outputs, row-wise its
inputs. Both meet in one DTensor, whose placements alone do not tell the roles of the axes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import DDP, replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

ParameterKey = tuple[int, str]
"""Identity of a module, and the name of a parameter in it."""


@dataclass(frozen=True, slots=True)
class DataParallelism:
    """Treatment of a parameter by FSDP2, HSDP or DDP."""

    mesh: DeviceMesh | None = None
    """Mesh of FSDP2 and HSDP; None for DDP and without data parallelism."""
    gradient_divisor: float = 1.0
    """Divisor of the sum of the gradients over the ranks."""
    record: Any = None
    """FSDP2's internal record of the parameter."""

    def stored(self, param: nn.Parameter) -> nn.Parameter:
        """The stored form of ``param``, which is the module's present parameter.

        After a forward pass without a backward pass (evaluation), FSDP2 can leave the gathered
        parameter in the module. It has no gradient and is in no optimizer.
        """
        if self.record is None or self.record.sharded_state.name == "SHARDED":
            return param
        return self.record.sharded_param


NO_DATA_PARALLELISM = DataParallelism()


@dataclass(frozen=True, slots=True)
class LayerSharding:
    """Roles of the mesh axes of a layer's weight; all empty for a plain tensor.

    Ranks along an axis without a role see the same rows, inputs and outputs.
    """

    row_axes: tuple[int, ...] = ()
    """Ranks along these have different rows (tokens, samples), and the sums add up over them."""
    input_axes: tuple[int, ...] = ()
    """Axes that cut the input: ranks see the same rows, and each its own part of them."""
    output_axes: tuple[int, ...] = ()
    """Axes that cut the output."""
    expert_axes: tuple[int, ...] = ()
    """Axes along which ranks have different matrices of a stack, each with all of its rows."""
    gradient_divisor: float = 1.0
    """Divisor of gradients that are added up over the ranks with different rows.

    The gradient is that of the summed losses of these ranks, divided by this. The bias gradient is
    therefore the sum of ``output_sum`` over them divided by this, and ``output_moment`` must be
    divided by its square.
    """


def layer_sharding(
    weight: Tensor, data: DataParallelism, *, batch_dims: int = 0, is_transposed: bool = False
) -> LayerSharding:
    """Roles of the mesh axes of ``weight``.

    Args:
        weight: ``(d_out, d_in, ...)``, after ``batch_dims``.
        data: Its treatment by FSDP2, HSDP or DDP.
        batch_dims: Leading dims that stack matrices.
        is_transposed: True if the weight is ``(d_in, d_out)``.
    """
    if not isinstance(weight, DTensor):
        return LayerSharding(gradient_divisor=data.gradient_divisor)
    row_axes = _axes_of(data.mesh, weight.device_mesh)
    output_dim, input_dim = (1, 0) if is_transposed else (batch_dims, batch_dims + 1)
    cut_dims = {
        axis: placement.dim
        for axis, placement in enumerate(weight.placements)
        if axis not in row_axes and isinstance(placement, Shard)
    }
    return LayerSharding(
        row_axes=row_axes,
        input_axes=tuple(axis for axis, dim in cut_dims.items() if dim == input_dim),
        output_axes=tuple(axis for axis, dim in cut_dims.items() if dim == output_dim),
        expert_axes=tuple(axis for axis, dim in cut_dims.items() if dim < batch_dims),
        gradient_divisor=data.gradient_divisor,
    )


def reshard(models: Iterable[nn.Module]) -> None:
    """Put the stored parameters back into all modules.

    FSDP2 leaves gathered ones in the root of a model after a forward pass.
    """
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def data_parallelism(model: nn.Module) -> dict[ParameterKey, DataParallelism]:
    """Treatment by FSDP2, HSDP or DDP of those parameters of ``model`` that have one."""
    found: dict[ParameterKey, DataParallelism] = {}
    for module in model.modules():
        replicas = _num_ddp_replicas(module)
        if replicas is not None:
            replicated = DataParallelism(gradient_divisor=replicas)
            for owner in module.modules():
                found |= {(id(owner), name): replicated for name in owner._parameters}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            found |= _fully_sharded(module)
    return found


def _fully_sharded(unit: FSDPModule) -> dict[ParameterKey, DataParallelism]:
    """Treatment of the parameters that FSDP2 manages in one of its units."""
    found = {}
    for group, param in _managed(unit):
        mesh = param.mesh_info.mesh
        divisor = group.gradient_divide_factor
        data = DataParallelism(mesh, float(mesh.size() if divisor is None else divisor), param)
        owners = param._module_info
        found[id(owners.module), owners.param_name] = data
        for owner, name in zip(owners.shared_modules, owners.shared_param_names, strict=True):
            found[id(owner), name] = data
    return found


def _managed(unit: FSDPModule) -> Iterator[tuple[Any, Any]]:
    """FSDP2's records: pairs of a parameter group and a parameter in it."""
    state = unit._get_fsdp_state()
    # A unit had at most one group in torch before 2.13.
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        if group is not None:
            yield from ((group, param) for param in group.fsdp_params)


def _num_ddp_replicas(module: nn.Module) -> int | None:
    """Number of ranks over which DDP (wrapper, composable) averages gradients; None without."""
    if isinstance(module, DistributedDataParallel):
        return module.process_group.size()
    if not isinstance(module, DDP):
        return None
    state: Any = replicate.state(module)
    if state.has_initialized:
        return state._ddp.process_group.size()
    mesh, group = (state._init_kwargs.get(name) for name in ("device_mesh", "process_group"))
    if mesh is not None:
        return mesh.size()
    return dist.get_world_size(group)


def local_size(size: int, weight: Tensor, axes: tuple[int, ...]) -> int:
    """Extent on this rank of a dim of ``size`` that ``axes`` of the weight's mesh cut."""
    if not axes:
        return size
    assert isinstance(weight, DTensor)
    for axis in axes:
        chunk = -(-size // weight.device_mesh.size(axis))
        before = chunk * weight.device_mesh.get_local_rank(axis)
        size = max(0, min(chunk, size - before))
    return size


def compute_device(weight: Tensor) -> torch.device:
    """Device on which a layer computes; with offloading, its weight is stored on another one."""
    if not isinstance(weight, DTensor) or weight.is_meta:
        return weight.device
    kind = weight.device_mesh.device_type
    if kind == weight.device.type:
        return weight.device
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _axes_of(part: DeviceMesh | None, whole: DeviceMesh) -> tuple[int, ...]:
    """The axes of ``whole`` that ``part`` consists of; FSDP2 puts its own first."""
    if part is None:
        return ()
    if whole.mesh_dim_names and part.mesh_dim_names:
        names = set(part.mesh_dim_names)
        return tuple(axis for axis, name in enumerate(whole.mesh_dim_names) if name in names)
    return tuple(range(part.ndim))
