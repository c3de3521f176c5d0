"""SOAP under FSDP2: ``torchrun --standalone --nproc_per_node=2 examples/fsdp2.py``.

On GPUs where there are enough of them, otherwise on CPUs. The optimizer is constructed after
``fully_shard``, and is told nothing about the mesh.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from titan_shampoo import SOAP


def main() -> None:
    """Train a small network on rows of which every rank has its own."""
    local_rank, world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    kind = "cuda" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu"
    device = torch.device(kind, local_rank if kind == "cuda" else 0)
    mesh = init_device_mesh(kind, (world_size,), mesh_dim_names=("fsdp",))

    torch.manual_seed(0)  # the same weights and the same teacher on all ranks
    teacher = torch.randn(64, 8, device=device)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).to(device)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = SOAP(model, lr=1e-2, block_size=128)

    torch.manual_seed(1 + dist.get_rank())
    for step in range(1, 31):
        rows = torch.randn(64, 64, device=device)
        loss = nn.functional.mse_loss(model(rows), rows @ teacher)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and dist.get_rank() == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
