"""Parameters that FSDP2 keeps in the memory of the host."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tests.support.ranks import run_on_ranks
from titan_shampoo import Shampoo
from titan_shampoo.distributed.layout import check_device


def test_parameters_offloaded_to_the_host_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layers.0.wq: got a shard in cpu memory .* offload"):
        check_device("cpu", "cuda", "layers.0.wq")
    check_device("cpu", "cpu", "layers.0.wq")
    check_device("cuda", "cuda", "layers.0.wq")


def step_offloaded(policy: OffloadPolicy) -> Tensor:
    """Where there is no accelerator, offloaded parameters lie where they are computed with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    fully_shard(model, offload_policy=policy)
    optimizer = Shampoo(model.named_parameters(), block_size=4, precondition_frequency=1)
    for step in range(3):
        model(torch.full((2, 8), 1.0 + step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = model[0].weight
    assert isinstance(weight, DTensor)
    return weight.full_tensor().detach()


def test_offloading_on_a_machine_of_processors_changes_nothing() -> None:
    policies = OffloadPolicy(), CPUOffloadPolicy(pin_memory=False)
    kept, offloaded = (run_on_ranks(2, step_offloaded, policy) for policy in policies)
    for one, other in zip(kept, offloaded, strict=True):
        assert torch.equal(one, other)


def refusal_of_offloaded() -> str:
    """What an optimizer of really offloaded parameters says."""
    model = nn.Linear(8, 8, device="cuda")
    fully_shard(model, mesh=init_device_mesh("cuda", (1,)), offload_policy=CPUOffloadPolicy())
    with pytest.raises(ValueError, match="CPU offload") as refusal:
        Shampoo(model.named_parameters())
    return str(refusal.value)


@pytest.mark.gpu
def test_parameters_that_fsdp_offloads_from_an_accelerator_are_refused() -> None:
    (message,) = run_on_ranks(1, refusal_of_offloaded)
    assert message == (
        "weight: got a shard in cpu memory on a mesh of cuda devices, wanted both on cuda; switch "
        "off CPU offload"
    )
