"""Statistics of a layer that is cut over ranks, reduced to those of the whole layer."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from titan_shampoo.statistics import TappedLayer


def sums_of(layer: TappedLayer) -> dict[str, Tensor]:
    names = ("input_sum", "output_sum", "input_moment", "output_moment")
    values = {name: getattr(layer, name) for name in names}
    return {name: value.clone() for name, value in values.items() if value is not None}


def reduced(layer: TappedLayer) -> dict[str, Tensor]:
    """The sums over all ranks, and of the whole layer, by nothing but what the layer says."""
    sums, sharding = sums_of(layer), layer.sharding
    if isinstance(layer.weight, DTensor):
        mesh = layer.weight.device_mesh
        for axis in sharding.row_axes:
            for value in sums.values():
                dist.all_reduce(value, group=mesh.get_group(axis))
        for axis in sharding.input_axes:
            inputs, count = sums["input_sum"].tensor_split([-1])
            sums["input_sum"] = torch.cat([gathered(inputs, mesh, axis), count])
        for axis in sharding.output_axes:
            sums["output_sum"] = gathered(sums["output_sum"], mesh, axis)
    return sums


def gathered(part: Tensor, mesh: DeviceMesh, axis: int) -> Tensor:
    placements = [Shard(0) if other == axis else Replicate() for other in range(mesh.ndim)]
    return DTensor.from_local(part, mesh, placements).full_tensor()
