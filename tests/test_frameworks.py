"""What trainers, wrappers and compilers of others do with an optimizer, and with a tapped model.

Each test does what one framework does, in the fewest lines; docs/frameworks.md names them.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim.swa_utils import AveragedModel

import titan_shampoo
from tests.support.ranks import run_on_ranks
from titan_shampoo import FOOF, KFAC, SOAP, Eva, EvaF, EvaS, KLShampoo, Shampoo
from titan_shampoo.statistics import tap, untap

BLOCKS: dict[str, Any] = {"block_size": 4, "precondition_frequency": 3, "start_step": 1}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Shampoo": (Shampoo, BLOCKS),
    "SOAP": (SOAP, BLOCKS),
    "KLShampoo": (KLShampoo, BLOCKS),
    "Eva": (Eva, {}),
    "EvaF": (EvaF, {}),
    "EvaS": (EvaS, {}),
    "FOOF": (FOOF, {"precondition_frequency": 3}),
    "KFAC": (KFAC, {"precondition_frequency": 3}),
}
TAPPED = ["Eva", "EvaF", "FOOF", "KFAC"]

every_method = pytest.mark.parametrize("method", METHODS)
of_every_kind = pytest.mark.parametrize("method", ["Shampoo", "Eva", "EvaS", "KFAC"])
every_tapped_method = pytest.mark.parametrize("method", TAPPED)


class Network(nn.Module):
    """A backbone, which may be trained late, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, rows: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.backbone(rows)))
        return output


def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


def rows_of(step: int) -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def made(method: str, model: nn.Module, params: Any = None, **options: Any) -> Any:
    """An optimizer of named parameters, by default all of those of ``model``."""
    kind, own = METHODS[method]
    given = model.named_parameters() if params is None else params
    looks = {"model": model} if method in TAPPED else {}
    return kind(given, **{"lr": 0.05} | own | looks | options)


def train(model: nn.Module, optimizer: Any, steps: range, step: Any = None) -> None:
    for number in steps:
        optimizer.zero_grad()
        model(rows_of(number)).square().mean().backward()
        (step or optimizer.step)()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


# torch.compile


@pytest.fixture
def compiler() -> Callable[..., Any]:
    """Graphs are made as always, but run by torch, which saves minutes of C++ compilation."""
    torch._dynamo.reset()
    return lambda function, **options: torch.compile(function, backend="aot_eager", **options)


@every_method
def test_a_compiled_step_is_the_step(method: str, compiler: Callable[..., Any]) -> None:
    """With a rate that changes in every step, as it does with a schedule."""
    results = []
    for wrap in (lambda function: function, compiler):
        model = network()
        optimizer = made(method, model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        step = wrap(optimizer.step)
        for number in range(10):
            train(model, optimizer, range(number, number + 1), step)
            scheduler.step()
        results.append(weights(model))
    assert torch.equal(*results)


@of_every_kind
def test_a_compiled_step_that_must_be_one_graph_is_refused_with_the_remedy(
    method: str, compiler: Callable[..., Any]
) -> None:
    model = network()
    optimizer = made(method, model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave out fullgraph=True, and set"):
        train(model, optimizer, range(1), compiler(optimizer.step, fullgraph=True))


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)
@of_every_kind
def test_a_function_of_a_whole_training_step_is_compiled(
    method: str, compiler: Callable[..., Any]
) -> None:
    """Clearing gradients, forward and backward pass and step, in one."""
    results = []
    for wrap in (lambda function: function, compiler):
        model = network()
        optimizer = made(method, model)

        def training_step(
            rows: Tensor, model: nn.Module = model, optimizer: Any = optimizer
        ) -> None:
            optimizer.zero_grad()
            model(rows).square().mean().backward()
            optimizer.step()

        compiled = wrap(training_step)
        for number in range(6):
            compiled(rows_of(number))
        results.append(weights(model))
    eager, compiled_step = results
    assert torch.allclose(eager, compiled_step, rtol=1e-12, atol=1e-12)


# Construction


@every_method
def test_a_model_stands_for_its_parameters(method: str) -> None:
    """``optimizer_cls_and_kwargs=(Eva, {"model": model})`` is called as ``Eva(model)``."""
    kind, options = METHODS[method]
    model, twin = network(), network()
    optimizer = kind(model, lr=0.05, **options)
    assert [name for name, _ in twin.named_parameters()] == optimizer.param_groups[0]["param_names"]
    train(model, optimizer, range(5))
    train(twin, made(method, twin), range(5))
    assert torch.equal(weights(model), weights(twin))


@every_tapped_method
def test_a_model_that_is_missing_is_asked_for(method: str) -> None:
    kind, options = METHODS[method]
    with pytest.raises(ValueError, match=r"^model: got None, wanted the model .*set model=model$"):
        kind(network().named_parameters(), lr=0.05, **options)


@every_tapped_method
def test_groups_without_names_are_named_by_the_model(method: str) -> None:
    """Trainer's and skorch's groups: with and without weight decay, no names."""
    model = network()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = made(method, model, groups)
    assert optimizer.preconditions(model.backbone[0].weight)
    assert "backbone.0.weight" in optimizer.sharded_state()


def flattened(uses_original: bool) -> str:
    model = FullyShardedDataParallel(
        nn.Linear(8, 8), use_orig_params=uses_original, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="flattened") as caught:
        Shampoo(model.named_parameters(), lr=0.1)
    return str(caught.value)


@pytest.mark.parametrize("uses_original", [True, False])
def test_parameters_that_fsdp1_flattened_are_refused(uses_original: bool) -> None:
    """All of them would be vectors, which AdamW steps."""
    for message in run_on_ranks(2, flattened, uses_original):
        assert message.endswith("leaves no matrices; shard with fully_shard (FSDP2)")


# Groups that a framework replaces


def sharded_as_accelerate_does(method: str) -> float:
    """Largest difference from an optimizer that was made after sharding."""
    results = []
    for replaces in (True, False):
        model = network()
        optimizer = made(method, model) if replaces else None
        if optimizer is not None:
            optimizer.load_state_dict(optimizer.state_dict())  # AcceleratedOptimizer's constructor
            names = {param: name for name, param in model.named_parameters()}
            order = [names[param] for param in optimizer.param_groups[0]["params"]]
        mesh = init_device_mesh("cpu", (2,))
        for module in (model.backbone[0], model.norm, model.head):
            fully_shard(module, mesh=mesh)
        if optimizer is None:
            optimizer = made(method, model)
        else:  # fsdp2_switch_optimizer_parameters
            now = dict(model.named_parameters())
            optimizer.param_groups[0]["params"] = [now[name] for name in order]
        for step in range(6):
            optimizer.zero_grad()
            model(rows_of(2 * step + dist.get_rank())).square().mean().backward()
            optimizer.step()
        whole = [param.full_tensor().flatten() for param in model.parameters()]  # type: ignore[attr-defined]
        results.append(torch.cat(whole).detach())
    assert not torch.equal(results[0], weights(network()))
    return float((results[0] - results[1]).abs().max())


@of_every_kind
def test_parameters_that_are_sharded_after_construction_and_replaced_are_followed(
    method: str,
) -> None:
    """Accelerate under FSDP2 puts sharded parameters into the groups of a finished optimizer."""
    assert run_on_ranks(2, sharded_as_accelerate_does, method) == [0.0, 0.0]


def finetuned(method: str, model: Network, named: bool) -> Any:
    """An optimizer of the head, to which the backbone was added."""

    def pairs(prefix: str) -> Any:
        some = [(n, p) for n, p in model.named_parameters() if n.startswith(prefix)]
        return some if named else [param for _, param in some]

    optimizer = made(method, model, pairs("head"))
    optimizer.add_param_group({"params": pairs("backbone"), "lr": 0.01})
    return optimizer


@pytest.mark.filterwarnings("ignore:without names")
@every_method
@pytest.mark.parametrize("named", [True, False])
def test_groups_that_are_assigned_before_the_state_is_loaded_are_followed(
    method: str, named: bool
) -> None:
    """Lightning's BaseFinetuning: the optimizer is made of the head, then gets all its groups."""
    model = network()
    optimizer = finetuned(method, model, named)
    train(model, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = 0.02
    train(model, optimizer, range(4, 8))

    other = network()
    other.load_state_dict(saved[0])
    head = [(n, p) for n, p in other.named_parameters() if n.startswith("head")]
    resumed = made(method, other, head if named else [param for _, param in head])
    backbone = list(other.backbone.parameters())
    resumed.param_groups = [
        group | {"params": params}
        for group, params in zip(groups, ([param for _, param in head], backbone), strict=True)
    ]
    resumed.load_state_dict(saved[1])
    resumed.param_groups[0]["lr"] = 0.02  # by a schedule, in the groups that are there now
    train(other, resumed, range(4, 8))
    assert torch.equal(weights(other), weights(model))


@every_method
def test_groups_that_are_copied_later_are_followed_with_their_state(method: str) -> None:
    model, twin = network(), network()
    optimizer, plain = made(method, model), made(method, twin)
    train(model, optimizer, range(4))
    train(twin, plain, range(4))
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.01
    train(model, optimizer, range(4, 8))
    train(twin, plain, range(4, 8))
    assert torch.equal(weights(model), weights(twin))


@every_method
def test_flat_parameters_that_are_put_into_the_groups_are_refused(method: str) -> None:
    """DeepSpeed's ZeRO: one vector for each group."""
    model = network()
    optimizer = made(method, model)
    flat = nn.Parameter(weights(model))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    before = weights(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^params: all tensors .* are flat .*fully_shard"):
            optimizer.step()
    assert torch.equal(weights(model), before)


@every_method
def test_a_group_without_names_beside_one_with_names_is_refused_by_torch(method: str) -> None:
    """``BaseFinetuning.unfreeze_and_add_param_group``; the docs say how to add it with names."""
    model = network()
    optimizer = made(method, model, model.head.named_parameters())
    with pytest.raises(ValueError, match="should be with/without names"):
        optimizer.add_param_group({"params": list(model.backbone.parameters())})


# Schedulers


@every_method
def test_one_cycle_cycles_betas_and_leaves_momentum(method: str) -> None:
    """torch's schedulers look for ``betas`` and find those of the fallback."""
    model = network()
    optimizer = made(method, model, momentum=0.9, dampening=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=9)
    seen = []
    for step in range(8):
        group = optimizer.param_groups[0]
        seen.append((group["momentum"], group["betas"][0]))
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    assert {momentum for momentum, _ in seen} == {0.9}
    assert min(beta for _, beta in seen) < 0.86
    assert seen[0][1] == 0.95


@pytest.mark.parametrize("method", [method for method in METHODS if method != "SOAP"])
def test_dampening_counts_from_the_first_step_on(method: str) -> None:
    """Not so in torch.optim.SGD, whose buffer begins with the first gradient. SOAP rests first."""
    moves = []
    for dampening in (0.0, 0.75):
        model: Any = network()
        weight = model.backbone[0].weight
        before = weight.detach().clone()
        train(model, made(method, model, momentum=0.9, dampening=dampening), range(1))
        moves.append(weight.detach() - before)
    assert moves[0].any()
    torch.testing.assert_close(moves[1], 0.25 * moves[0])


# Tapped models


def tapped_network() -> Network:
    model = network()
    train(model, made("KFAC", model), range(2))
    return model


class Experts(nn.Module):
    """A stack of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(6, dtype=torch.float64).repeat(2, 1, 1))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.stack([rows @ matrix.mT for matrix in self.w])


@pytest.mark.parametrize("kind", ["layers", "stack"])
def test_a_saved_model_loads_where_this_package_is_not_installed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: nn.Module = tapped_network()
    if kind == "stack":
        model = nn.Sequential(nn.Linear(6, 6).double(), Experts())
        tap(model, is_stack="1.w".__eq__)
    wanted = model(rows_of(0)).detach()
    torch.save(model, tmp_path / "model.pt")
    for name in [name for name in sys.modules if name.split(".")[0] == "titan_shampoo"]:
        monkeypatch.setitem(sys.modules, name, None)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    output = loaded(rows_of(0))
    assert torch.equal(output, wanted)
    output.sum().backward()
    assert all(param.grad is not None for param in loaded.parameters())


def test_a_model_that_was_saved_can_be_tapped_again(tmp_path: Path) -> None:
    model = tapped_network()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    train(model, made("Eva", model), range(3))
    train(loaded, made("Eva", loaded), range(3))
    assert torch.equal(weights(loaded), weights(model))


def test_an_averaged_model_measures_nothing_for_the_one_that_is_trained() -> None:
    model, twin = network(), network()
    optimizer, plain = made("Eva", model), made("Eva", twin)
    average = AveragedModel(model)
    assert list(average.module.state_dict()) == list(twin.state_dict())
    for step in range(4):
        optimizer.zero_grad()
        average(rows_of(100 + step)).sum().backward()  # with gradients, by mistake
        model(rows_of(step)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    train(twin, plain, range(4))
    assert torch.equal(weights(model), weights(twin))


def test_an_exported_program_has_no_taps_and_can_be_trained() -> None:
    """With taps in it, gradients would end at the first one."""
    model = tapped_network()
    exported = torch.export.export(model, (rows_of(0),)).module()
    assert "detach" not in exported.code
    model.zero_grad()
    model(rows_of(0)).sum().backward()
    exported(rows_of(0)).sum().backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(exported.get_parameter(name).grad, param.grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_program_has_no_taps() -> None:
    model = tapped_network()
    traced = torch.jit.trace(model, rows_of(0))
    assert torch.equal(traced(rows_of(1)), model(rows_of(1)))
    assert "detach" not in str(traced.inlined_graph)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_copy_without_taps_can_be_scripted_and_transformed() -> None:
    model = tapped_network()
    bare = copy.deepcopy(model)
    untap(bare)
    assert not any("forward" in module.__dict__ for module in bare.modules())
    wanted = model(rows_of(0))
    assert torch.equal(torch.jit.script(bare)(rows_of(0)), wanted)
    assert torch.allclose(torch.vmap(bare)(rows_of(0)), wanted)
    pushed = torch.func.jvp(bare, (rows_of(0),), (rows_of(1),))
    assert torch.equal(pushed[0], wanted)
    untap(bare)  # once more, and of a model without taps
    train(model, made("Eva", model), range(1))  # whose own are where they were


@every_tapped_method
def test_a_model_whose_taps_are_taken_off_is_named(method: str) -> None:
    model = network()
    optimizer = made(method, model)
    train(model, optimizer, range(2))
    untap(model)
    with pytest.raises(RuntimeError, match=r"^backbone\.0: its tap was removed; give untap a"):
        train(model, optimizer, range(2, 3))
    train(model, made(method, model), range(3))


@pytest.mark.filterwarnings(
    "ignore:.*torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize_per_tensor"
)
def test_a_tapped_model_can_be_quantized() -> None:
    model = tapped_network().float()
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    rows = rows_of(0).float()
    error = (small(rows) - model(rows)).detach().abs().max()
    assert error < 0.05 * model(rows).detach().abs().max()


def test_every_public_method_is_tried_here() -> None:
    assert set(METHODS) == set(titan_shampoo.__all__)
