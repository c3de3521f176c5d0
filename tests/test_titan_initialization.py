"""The initial weights are those of one rank, however the model is sharded."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.support.ranks import run_on_ranks
from titan_shampoo.titan.initialization import DrawWhole, initialize_alike, unwrapped_name

# World size, mesh shape with axes; 13, 11 and 7 rows divide evenly by nothing.
LAYOUTS = {
    "fsdp2": (2, (2,), ("fsdp",)),
    "fsdp3_uneven": (3, (3,), ("fsdp",)),
    "fsdp4_empty_shards": (4, (4,), ("fsdp",)),
    "hsdp2x2": (4, (2, 2), ("replicate", "fsdp")),
    "tp2": (2, (2,), ("tp",)),
    "fsdp2_tp2": (4, (2, 2), ("fsdp", "tp")),
}


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(7, 13)
        self.down = nn.Linear(13, 11, bias=False)
        self.norm = nn.Linear(2, 3)

    def init_weights(self, buffer_device=None):
        nn.init.normal_(self.up.weight)  # drawn twice: the second draw is another one
        copy = self.up.weight.float()  # the parameter itself if it is float32
        nn.init.trunc_normal_(copy, std=0.02)
        self.up.weight.copy_(copy)
        nn.init.uniform_(self.up.bias)
        nn.init.kaiming_uniform_(self.down.weight)
        nn.init.normal_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)


def sharded(layout):
    with torch.device("meta"):
        model = TwoLayers()
    if layout is None:
        return model
    _, shape, axes = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
    if "tp" in axes:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
    data_axes = tuple(axis for axis in axes if axis != "tp")
    if data_axes:
        fully_shard(model, mesh=mesh[data_axes])
    return model


def initial_weights(layout, dtype=torch.float32):
    model = sharded(layout).to(dtype)
    model.to_empty(device="cpu")
    initialize_alike(model, seed=3)
    with torch.no_grad():
        model.init_weights()
    whole = {
        name: param.full_tensor() if isinstance(param, DTensor) else param
        for name, param in model.named_parameters()
    }
    return {name: param.detach().float().numpy().copy() for name, param in whole.items()}


def initial_weights_of_all(layouts):
    return {
        (layout, dtype): initial_weights(layout, getattr(torch, dtype))
        for layout in layouts
        for dtype in ("float32", "bfloat16")
    }


@pytest.fixture(scope="module")
def drawn():
    """By layout and precision, the weights that each rank sees."""
    by_layout: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {}
    for world_size in (2, 3, 4):
        layouts = [name for name, (size, _, _) in LAYOUTS.items() if size == world_size]
        ranks = run_on_ranks(world_size, initial_weights_of_all, layouts)
        by_layout |= {key: [rank[key] for rank in ranks] for key in ranks[0]}
    return by_layout


# torchtitan fills bfloat16 weights by way of a float32 copy.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_from_the_weights_of_one_rank(drawn, layout, dtype):
    expected = initial_weights(None, getattr(torch, dtype))
    for weights in drawn[layout, dtype]:
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight, expected[name], err_msg=name)


def test_weights_have_the_wanted_distribution():
    model = nn.Linear(400, 400, bias=False)
    with DrawWhole(model, seed=0), torch.no_grad():
        model.weight.normal_(1.0, 2.0)
    assert model.weight.mean().item() == pytest.approx(1.0, abs=0.03)
    assert model.weight.std().item() == pytest.approx(2.0, rel=0.01)


def test_draws_differ_by_parameter_by_draw_and_by_seed():
    def draws(seed):
        a, b = nn.Linear(4, 4), nn.Linear(4, 4)
        with DrawWhole(nn.ModuleDict({"a": a, "b": b}), seed), torch.no_grad():
            return [nn.init.normal_(layer.weight).clone() for layer in (a, a, b)]

    different = [*draws(0), *draws(1)]
    for i, first in enumerate(different):
        for second in different[i + 1 :]:
            assert not torch.equal(first, second)


def test_wrappers_do_not_change_the_weights():
    assert unwrapped_name("layers.0._orig_mod._checkpoint_wrapped_module.wq") == "layers.0.wq"
    assert unwrapped_name("module.layers.0.wq") == "layers.0.wq"
