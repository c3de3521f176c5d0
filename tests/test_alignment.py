"""``block_alignment="shard"``: nothing travels, and state is not taken for that of other shards."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.support.ranks import run_on_ranks
from titan_shampoo import SOAP, Shampoo
from titan_shampoo.distributed.blocks import Alignment

SHAPES: dict[str, tuple[int, ...]] = {"even": (12, 10), "uneven": (11, 8), "conv": (8, 3, 2, 2)}
STEPS = 9
METHODS: dict[str, Any] = {"Shampoo": Shampoo, "SOAP": SOAP}
OPTIONS: dict[str, Any] = {
    "lr": 0.1, "block_size": 5, "precondition_frequency": 3, "start_step": 1,
    "refresh": "together",  # turns are spread over blocks, which the shards here are not
}  # fmt: skip


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def cut(name: str, tensor: Tensor, rank: int) -> Tensor:
    """Shard of one of two ranks as its own tensor, further cut where the whole has block edges."""
    half = -(-SHAPES[name][0] // 2)
    return tensor[rank * half : (rank + 1) * half]


def sharded(
    alignment: Alignment, ranks: int, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    mesh = init_device_mesh("cpu", (ranks,))
    params = {}
    for name, whole in tensors(0).items():
        placed = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        params[name] = torch.nn.Parameter(placed)
    return mesh, {"params": params, "optimizer": Shampoo(
        params.items(), block_alignment=alignment, **OPTIONS | options
    )}  # fmt: skip


def set_gradients(mesh: Any, params: dict[str, Any], step: int) -> None:
    for name, grad in tensors(step).items():
        params[name].grad = distribute_tensor(grad, mesh, [Shard(0)], src_data_rank=None)


def train_sharded(options: dict[str, Any]) -> dict[str, Tensor]:
    mesh, run = sharded("shard", 2, options)
    for step in range(1, STEPS + 1):
        set_gradients(mesh, run["params"], step)
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(dist, "all_to_all_single")
            run["optimizer"].step()
    return {name: param.detach().full_tensor() for name, param in run["params"].items()}


def test_every_shard_is_stepped_as_if_it_were_the_parameter() -> None:
    # One block of at most 64 per shard: no edge of the whole parameter falls inside.
    options = {"block_size": 64}
    expected = {}
    for rank in range(2):
        params = {n: torch.nn.Parameter(cut(n, t, rank).clone()) for n, t in tensors(0).items()}
        optimizer = Shampoo(params.items(), **OPTIONS | options)
        for step in range(1, STEPS + 1):
            for name, grad in tensors(step).items():
                params[name].grad = cut(name, grad, rank).clone()
            optimizer.step()
        expected[rank] = {name: param.detach() for name, param in params.items()}
    for result in run_on_ranks(2, train_sharded, options):
        for name in SHAPES:
            whole = torch.cat([expected[0][name], expected[1][name]])
            torch.testing.assert_close(result[name], whole, rtol=1e-11, atol=1e-12)


def grids(options: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], ...]]:
    _, run = sharded("shard", dist.get_world_size(), options)
    return {name: grid.edges for name, grid in run["optimizer"].grids().items()}


def test_blocks_are_cut_at_shard_edges_as_well_as_at_multiples() -> None:
    (edges, *others) = run_on_ranks(2, grids, {})
    assert edges["even"] == ((0, 5, 6, 10, 12), (0, 5, 10))
    assert edges["uneven"] == ((0, 5, 6, 10, 11), (0, 5, 8))
    assert others == [edges]


def keys(alignment: Alignment) -> dict[str, list[str]]:
    _, run = sharded(alignment, dist.get_world_size(), {})
    return {name: sorted(state) for name, state in run["optimizer"].sharded_state().items()}


def test_keys_of_state_tell_meshes_apart() -> None:
    two, four = run_on_ranks(2, keys, "shard")[0], run_on_ranks(4, keys, "shard")[0]
    for name in ("even", "uneven"):
        own = {key for key in two[name] if key not in ("step", "cursor")}
        assert own
        assert own.isdisjoint(four[name])


def test_keys_of_state_do_not_depend_on_the_mesh_otherwise() -> None:
    assert run_on_ranks(2, keys, "global")[0] == run_on_ranks(4, keys, "global")[0]


def loaded_into_other_edges() -> str:
    """The error on loading state of 12 rows cut at 6 into 12 rows cut in three."""
    mesh, run = sharded("shard", dist.get_world_size(), {"block_size": 64})
    set_gradients(mesh, run["params"], 1)
    run["optimizer"].step()
    state = run["optimizer"].state_dict()
    again = sharded("shard", dist.get_world_size(), {"block_size": 64})[1]["optimizer"]
    again.load_state_dict(state)  # the same edges
    other = sharded("shard", dist.get_world_size(), {"block_size": 4})[1]["optimizer"]
    for group in state["param_groups"]:
        group["block_size"] = 4
    try:
        other.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return "no error"


def test_state_of_other_edges_is_refused() -> None:
    for message in run_on_ranks(3, loaded_into_other_edges):
        assert "differing" in message


def test_an_unknown_alignment_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="block_alignment: got 'rank'"):
        Shampoo([("w", torch.nn.Parameter(torch.ones(4, 4)))], block_alignment="rank")  # type: ignore[arg-type]
