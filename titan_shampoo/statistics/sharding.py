"""Which mesh axes cut a layer's rows, inputs and outputs, read off its weight.

Under FSDP2 and HSDP a rank computes with the whole weight and its own rows. Under tensor
parallelism the ranks share the rows and cut the weight: column-wise its outputs, row-wise its
inputs. Both meet in one DTensor, whose placements alone do not say which axis is which.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

DataMeshes = dict[tuple[int, str], DeviceMesh]
"""The mesh that FSDP2 cuts a parameter over, by identity of the module and name in it."""


@dataclass(frozen=True, slots=True)
class LayerSharding:
    """Roles of the axes of the mesh of a layer's weight; all empty for a plain tensor.

    Ranks along an axis in none of them see the same rows, inputs and outputs.
    """

    row_axes: tuple[int, ...] = ()
    """Ranks along these have different rows (tokens, samples), and the sums add up over them."""
    input_axes: tuple[int, ...] = ()
    """Along these the input is cut: ranks see the same rows, and each its own part of them."""
    output_axes: tuple[int, ...] = ()
    """Along these the output is cut."""


def layer_sharding(weight: Tensor, data_mesh: DeviceMesh | None) -> LayerSharding:
    """How the layer of ``weight`` is cut.

    Args:
        weight: ``(d_out, d_in, ...)``, or a stack of such with a leading dim.
        data_mesh: Where FSDP2 or HSDP cuts it; None if they do not.
    """
    if not isinstance(weight, DTensor):
        return LayerSharding()
    data_axes = _axes_of(data_mesh, weight.device_mesh)
    cut_dims = {
        axis: placement.dim
        for axis, placement in enumerate(weight.placements)
        if axis not in data_axes and isinstance(placement, Shard)
    }
    return LayerSharding(
        row_axes=data_axes,
        input_axes=tuple(axis for axis, dim in cut_dims.items() if dim == 1),
        output_axes=tuple(axis for axis, dim in cut_dims.items() if dim == 0),
    )


def data_meshes(model: nn.Module) -> DataMeshes:
    """The mesh of every parameter of ``model`` that FSDP2 or HSDP manages."""
    meshes: DataMeshes = {}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        # One group per unit until torch 2.12, several since.
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for param in (param for group in groups if group for param in group.fsdp_params):
            owners = param._module_info
            for owner, name in (
                (owners.module, owners.param_name),
                *zip(owners.shared_modules, owners.shared_param_names, strict=True),
            ):
                meshes[id(owner), name] = param.mesh_info.mesh
    return meshes


def local_size(size: int, weight: Tensor, axes: tuple[int, ...]) -> int:
    """How much of a dim of ``size`` this rank has when ``axes`` of the weight's mesh cut it."""
    if not axes:
        return size
    assert isinstance(weight, DTensor)
    for axis in axes:
        chunk = -(-size // weight.device_mesh.size(axis))
        before = chunk * weight.device_mesh.get_local_rank(axis)
        size = max(0, min(chunk, size - before))
    return size


def compute_device(weight: Tensor) -> torch.device:
    """Where a layer computes: with offloaded parameters not where its weight is."""
    if not isinstance(weight, DTensor) or weight.is_meta:
        return weight.device
    kind = weight.device_mesh.device_type
    if kind == weight.device.type:
        return weight.device
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _axes_of(part: DeviceMesh | None, whole: DeviceMesh) -> tuple[int, ...]:
    """The axes of ``whole`` that are those of ``part``; FSDP2 puts its own first."""
    if part is None:
        return ()
    if whole.mesh_dim_names and part.mesh_dim_names:
        names = set(part.mesh_dim_names)
        return tuple(axis for axis, name in enumerate(whole.mesh_dim_names) if name in names)
    return tuple(range(part.ndim))
