"""The optimizers of a run: who steps which parameter, and what checkpoints make of the state."""

import zlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.support.optimizer_containers import (
    Values,
    container_of,
    optimizer_config,
    parameters,
    same,
    whole,
)
from tests.support.ranks import run_on_ranks
from titan_shampoo import SOAP, KLShampoo
from titan_shampoo.config import ConfigError
from titan_shampoo.config.tables import Group
from titan_shampoo.titan import ParallelDims
from titan_shampoo.titan.optimizers import (
    OptimizersContainer,
    Preconditioner,
    build_optimizers,
    members,
)

BLOCK_METHODS = ("Shampoo", "SOAP", "KLShampoo")
METHODS = (*BLOCK_METHODS, "AdamW", "SGD")

# Small blocks, so that the shards of two ranks cut some; the step after the fourth refreshes.
OWN_KEYS: dict[str, dict[str, Any]] = {
    method: {"block_size": 4, "precondition_frequency": 2, "start_step": 1, "momentum": 0.5}
    for method in BLOCK_METHODS
} | {"AdamW": {}, "SGD": {"momentum": 0.9}}


class Model(nn.Module):
    """Matrices of uneven sizes, vectors, and an embedding."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(7, 6, dtype=dtype)
        self.layers = nn.ModuleList([nn.Linear(6, 9, dtype=dtype), nn.Linear(9, 6, dtype=dtype)])
        self.norm = nn.LayerNorm(6, dtype=dtype)


def build(
    method: str, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Model, OptimizersContainer]:
    """A model, sharded by FSDP2 if there are several ranks, and its optimizers."""
    torch.manual_seed(seed)
    model = Model(dtype)
    if dist.is_initialized() and dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, container_of(model, optimizer_config(method, **OWN_KEYS[method]))


def step(model: nn.Module, container: OptimizersContainer, number: int) -> None:
    """One step on given gradients, the same on every layout."""
    for name, param in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {number}".encode()))
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
        param.grad = grad
    container.step()


def options_of(container: OptimizersContainer) -> dict[str, tuple[type, float, float]]:
    """Optimizer, learning rate and weight decay by parameter name."""
    return {
        name: (type(optimizer), group["lr"], group["weight_decay"])
        for optimizer in container.optimizers
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_a_parameter_belongs_to_the_first_group_that_matches_and_else_to_the_method():
    groups = (
        Group(r"bias$|norm", "AdamW", lr=1.0),
        Group(r"layers\.1", "SOAP", weight_decay=0.5),
        Group("layers", weight_decay=0.0),
    )
    found = options_of(container_of(Model(), optimizer_config("KLShampoo", groups)))
    assert found == {
        "layers.0.bias": (torch.optim.AdamW, 1.0, 0.1),
        "layers.1.bias": (torch.optim.AdamW, 1.0, 0.1),
        "norm.weight": (torch.optim.AdamW, 1.0, 0.1),
        "norm.bias": (torch.optim.AdamW, 1.0, 0.1),
        "layers.1.weight": (SOAP, 0.1, 0.5),
        "layers.0.weight": (KLShampoo, 0.1, 0.0),
        "tok_embeddings.weight": (KLShampoo, 0.1, 0.1),
    }


@pytest.mark.parametrize("method", BLOCK_METHODS)
def test_a_group_beats_the_methods_own_table_which_beats_the_shared_keys(method):
    config = optimizer_config(method, (Group("norm", lr=3.0),), lr=2.0, betas=[0.5, 0.6])
    container = container_of(Model(), config)
    found = options_of(container)
    assert found["norm.weight"] == (type(container.optimizers[0]), 3.0, 0.1)
    assert found["layers.0.weight"][1:] == (2.0, 0.1)
    assert all(g["betas"] == (0.5, 0.6) for o in container.optimizers for g in o.param_groups)


@pytest.mark.parametrize(
    ("method", "key"), [("Shampoo", "grafting_eps"), ("KLShampoo", "grafting_eps"), ("SOAP", "eps")]
)
def test_the_shared_epsilon_is_that_of_second_moments_and_never_the_damping(method, key):
    config = optimizer_config(method)
    config.eps = 0.25
    options = container_of(Model(), config).optimizers[0].defaults
    assert options[key] == 0.25
    assert options.get("eps") == {"Shampoo": 1e-12, "SOAP": 0.25, "KLShampoo": None}[method]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["layer$"], r'groups\[0\].pattern = "layer\$": matches .* no trained .*"layers"\?'),
        (["attention"], r'groups\[0\].pattern = "attention": .* parameter; one is '),
        (["layers", "bias", r"layers\.1"], r'groups\[2\].pattern = "layers.*: all .*; move it up'),
    ],
)
def test_a_group_that_no_parameter_belongs_to_is_refused(patterns, message):
    groups = tuple(Group(pattern=pattern, lr=0.2) for pattern in patterns)
    with pytest.raises(ConfigError, match=message):
        container_of(Model(), optimizer_config("Shampoo", groups))


def test_an_option_that_no_parameter_can_have_names_its_table():
    config = optimizer_config("Shampoo", exponent=[0.5])
    with pytest.raises(ConfigError, match=r"^optimizer\.shampoo: .*weight: exponent has 1"):
        container_of(Model(), config)


@pytest.mark.parametrize("method", METHODS)
def test_all_state_is_there_before_the_first_step_and_lives_in_the_optimizer(method):
    model, container = build(method, seed=0)
    before = container.state_dict()
    for name, _ in model.named_parameters():
        assert any(key.startswith(f"{name}.") for key in before), name
    at_zero = whole(before)
    step(model, container, 1)
    assert same(whole(before), whole(container.state_dict()))
    assert not same(whole(before), at_zero)


def test_a_state_of_other_names_is_refused():
    _, container = build("AdamW", seed=0)
    state = container.state_dict()
    state["zzz.step"] = state.pop("norm.bias.step")
    with pytest.raises(ValueError, match=r"2 entries differ: norm\.bias\.step, zzz\.step"):
        container.load_state_dict(state)


def train_save_and_resume(method: str, folder: str) -> tuple[Any, ...]:
    """Four steps, a checkpoint, a fifth step; then another model, which resumes from there."""
    model, container = build(method, seed=1)
    for number in range(1, 5):
        step(model, container, number)
    saved = whole(container.state_dict())
    dcp.save(
        {"optimizer": container, "model": dict(model.named_parameters())}, checkpoint_id=folder
    )
    step(model, container, 5)
    return saved, parameters(model), *resume(method, folder)


def resume(method: str, folder: str) -> tuple[Values, Values]:
    """The state that another model and its optimizers have loaded, and the weights a step later."""
    model, container = build(method, seed=2)
    step(model, container, 9)  # whatever is not loaded is wrong
    dcp.load(
        {"optimizer": container, "model": dict(model.named_parameters())}, checkpoint_id=folder
    )
    loaded = whole(container.state_dict())
    step(model, container, 5)
    return loaded, parameters(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_two_ranks_resumes_on_two_and_on_one(method, tmp_path):
    folder = str(tmp_path / "step-4")
    results = run_on_ranks(2, train_save_and_resume, method, folder)
    for saved, after, loaded, resumed in results:
        assert same(loaded, saved)
        assert same(resumed, after)
    saved, after = results[0][:2]
    ((loaded, resumed),) = run_on_ranks(1, resume, method, folder)
    assert same(loaded, saved)
    for name, expected in after.items():
        torch.testing.assert_close(resumed[name], expected, rtol=1e-11, atol=1e-13, msg=name)


def save_and_load_in_low_precision(method: str, folder: str) -> tuple[dict[str, Any], ...]:
    """Dtypes of the state before it is saved, and after it is loaded."""
    found = []
    for act in (dcp.save, dcp.load):
        model, container = build(method, seed=1, dtype=torch.bfloat16)
        step(model, container, 1)
        act({"optimizer": container}, checkpoint_id=folder)
        step(model, container, 2)
        found.append({name: value.dtype for name, value in container.state_dict().items()})
    return tuple(found)


@pytest.mark.parametrize("method", BLOCK_METHODS)
def test_state_of_low_precision_parameters_keeps_its_own_precision(method, tmp_path):
    for saved, loaded in run_on_ranks(
        2, save_and_load_in_low_precision, method, str(tmp_path / "step-1")
    ):
        assert saved == loaded
        assert saved["layers.0.weight.left.4"] == torch.float32
        assert saved["layers.0.weight.momentum"] == torch.float32
        assert saved["norm.bias.exp_avg"] == torch.bfloat16


def state_keys(method: str) -> list[str]:
    return list(build(method, seed=0)[1].state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_names_in_a_checkpoint_do_not_depend_on_rank_or_mesh(method):
    first, second = run_on_ranks(2, state_keys, method)
    assert set(first) == set(second) == set(state_keys(method))


class Unnamed(nn.Module):
    """An embedding, a head of its shape, and a projection with the name of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(7, 6)
        self.embed = nn.Linear(6, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 9), nn.Linear(9, 6)])
        self.last = nn.Linear(6, 7)


def recognised(container: OptimizersContainer) -> set[str]:
    """Names of the matrices that the methods themselves step."""
    return {
        name
        for optimizer in container.optimizers
        if isinstance(optimizer, Preconditioner)
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
        if param.ndim > 1 and optimizer.preconditions(param)
    }


MATRICES = {"embed.weight", "layers.0.weight", "layers.1.weight"}


@pytest.mark.parametrize("method", ["Shampoo", "EvaS", "EvaF", "FOOF"])
def test_modules_decide_what_is_preconditioned(method):
    assert recognised(container_of(Unnamed(), optimizer_config(method))) == MATRICES


@pytest.mark.parametrize("method", ["Shampoo", "EvaS", "EvaF", "FOOF"])
def test_a_stage_recognises_what_one_process_does(method):
    whole = Unnamed()
    stage = nn.ModuleDict({"layers": whole.layers, "last": whole.last})
    dims = ParallelDims(1, 1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    config = optimizer_config(method)
    container = build_optimizers([stage], config, dims, members(whole))
    assert recognised(container) == MATRICES - {"embed.weight"}


@pytest.mark.parametrize("method", ["Shampoo", "EvaF"])
def test_a_group_decides_against_names_and_modules(method):
    groups = (Group("last", precondition=True), Group("embed", precondition=False))
    container = container_of(Unnamed(), optimizer_config(method, groups))
    assert recognised(container) == MATRICES - {"embed.weight"} | {"last.weight"}


def test_modules_and_names_that_agree_make_no_group_of_their_own():
    container = container_of(Model(), optimizer_config("Shampoo"))
    assert [group["precondition"] for group in container.optimizers[0].param_groups] == [None]
