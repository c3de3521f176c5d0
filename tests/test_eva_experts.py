"""Every matrix of a stack of experts is stepped like a linear layer that saw that expert's rows."""

import copy
import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from parallel.gradients import sum_gradients
from tests.reference.eva import NaiveEva
from tests.support.expert_models import (
    DIM,
    EXPERTS,
    FORMS,
    HIDDEN,
    STACKS,
    TOKENS,
    ByLinear,
    ExpertParallel,
    Mixture,
    Separate,
    TensorParallel,
    batch,
    groups_of,
    mixture,
    torchtitans,
)
from tests.support.layer_models import normal, seen_by
from tests.support.ranks import run_on_ranks
from titan_shampoo import FOOF, KFAC, Eva, EvaF, EvaS
from titan_shampoo.layers.optimizer import LayerOptimizer
from titan_shampoo.statistics import tap

METHODS: dict[str, Any] = {"Eva": Eva, "EvaF": EvaF, "EvaS": EvaS}
STEPS, LR = 6, 0.05
VARIANTS: dict[str, dict[str, Any]] = {
    "clipped": {"damping": 1e-3, "weight_decay": 0.1},
    "unscaled": {"scaling": None, "lr": 1e-3, "nesterov": True},
    "relative": {"damping_mode": "relative", "damping": 0.3, "scaling": "norm"},
    "relative, unscaled": {"damping_mode": "relative", "scaling": None, "lr": 1e-3},
    "normalised": {"scaling": "kl_norm", "momentum": 0.0, "weight_decay_type": "l2",
                   "weight_decay": 0.1},
}  # fmt: skip

Values = dict[str, Tensor]


def make(method: str, model: nn.Module, **options: Any) -> LayerOptimizer:
    own = {} if method == "EvaS" else {"model": model}
    options = {"lr": LR, "statistics_decay": 0.5, **own, **options}
    groups = [group for group in groups_of(model) if group["params"]]
    return METHODS[method](groups, **options)


def loss_at(step: int) -> Any:
    tokens, choice, targets = batch(step)
    return lambda model: ((model(tokens, choice) - targets) ** 2).sum() / TOKENS


def separate_of(name: str) -> list[str]:
    """Names of the reference's layers."""
    return [f"experts.{name}.{expert}" for expert in range(EXPERTS)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_experts_are_stepped_as_separate_layers(method: str, variant: str) -> None:
    options = VARIANTS[variant]
    model, twin = mixture(), mixture(Separate)
    optimizer = make(method, model, **options)
    layers = [*(name for stack in STACKS for name in separate_of(stack)), "first", "last"]
    naive = NaiveEva(
        method,
        {name: _arrays(twin.get_submodule(name)) for name in layers},
        optimizer.param_groups[0],
    )
    for step in range(STEPS):
        _copy_weights(twin, model)
        naive.params = {name: _arrays(twin.get_submodule(name)) for name in layers}
        naive.step(seen_by(twin, loss_at(step), layers), optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss_at(step)(model).backward()
        optimizer.step()
        for name in STACKS:
            stack = getattr(model.experts, name).detach().numpy()
            for mine, layer in zip(stack, separate_of(name), strict=True):
                wanted = naive.params[layer][0]
                error = np.linalg.norm(mine - wanted) / np.linalg.norm(wanted)
                assert error < 1e-12, f"{layer}, step {step}: {error:.1e}"


def _arrays(module: Any) -> tuple[Any, Any]:
    bias = module.bias
    return module.weight.detach().numpy().copy(), (
        None if bias is None else bias.detach().numpy().copy()
    )


def _copy_weights(twin: Mixture, model: Mixture) -> None:
    with torch.no_grad():
        for name in STACKS:
            for expert, layer in enumerate(getattr(twin.experts, name)):
                layer.weight.copy_(getattr(model.experts, name)[expert])
        for name in ("first", "last"):
            getattr(twin, name).load_state_dict(getattr(model, name).state_dict())


def measured(model: Mixture, step: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums of each stack after one backward pass."""
    layers = {layer.name: layer for layer in tap(model, is_stack=_is_stack)}
    for layer in layers.values():
        layer.reset()
    loss_at(step)(model).backward()
    return {name: (layer.input_sum, layer.output_sum) for name, layer in layers.items()}


def _is_stack(name: str) -> bool:
    return name.removeprefix("experts.") in STACKS


def expected_sums(step: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """The same, of separate layers seen without any tap."""
    names = [name for stack in STACKS for name in separate_of(stack)]
    seen = seen_by(mixture(Separate), loss_at(step), names)
    found = {}
    for stack in STACKS:
        rows = [seen[name] for name in separate_of(stack)]
        inputs = [np.append(one.inputs.sum(0), len(one.inputs)) for one in rows]
        outputs = [one.output_grads.sum(0) for one in rows]
        found[f"experts.{stack}"] = torch.tensor(np.stack(inputs)), torch.tensor(np.stack(outputs))
    return found


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_tap_measures_the_rows_of_each_expert(form: str, step: int) -> None:
    found = measured(mixture(FORMS[form]), step)
    rtol, atol = (1e-5, 1e-6) if form == "grouped" else (1e-12, 1e-13)
    for name, wanted in expected_sums(step).items():
        torch.testing.assert_close(found[name], wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("form", FORMS)
def test_a_tap_changes_no_gradient(form: str) -> None:
    model, twin = mixture(FORMS[form]), mixture(FORMS[form])
    measured(model)
    loss_at(2)(twin).backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)


def test_grouped_products_of_torchtitan_are_tapped_in_their_precision() -> None:
    torch.manual_seed(0)
    experts: Any = torchtitans(16, 8, is_grouped=True)
    twin = torchtitans(16, 8)
    with torch.no_grad():
        experts.init_weights(0.5)
    twin.load_state_dict(experts.state_dict())
    counts = torch.tensor([5, 0, 9, 1])
    rows = torch.randn(15, 16)
    found = []
    for module in (experts, twin):
        layers = tap(module, is_stack=STACKS.__contains__)
        (module(rows, counts).float() ** 2).sum().backward()
        found.append([(layer.input_sum, layer.output_sum) for layer in layers])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine[0][:, -1], counts.float(), rtol=0, atol=0)
        for tensor, other in zip(mine, wanted, strict=True):
            assert (tensor - other).norm() < 0.03 * other.norm()


def test_rows_of_zeros_are_padding() -> None:
    model = mixture()
    layers = tap(model, is_stack=_is_stack)
    rows = torch.cat([normal(0, 3, DIM), torch.zeros(5, DIM), normal(1, 2, DIM)]).double()
    model.experts(rows, torch.tensor([8, 0, 2, 0])).sum().backward()
    for layer in layers:
        if layer.batch_dims:
            assert layer.input_sum[:, -1].tolist() == [3, 0, 2, 0]


def test_evaluation_and_recomputation_count_nothing() -> None:
    class Checkpointed(Mixture):
        def forward(self, tokens: Tensor, choice: Tensor) -> Tensor:
            return checkpoint(super().forward, tokens, choice, use_reentrant=False)

    model = mixture()
    model.__class__ = Checkpointed
    layers = [layer for layer in tap(model, is_stack=_is_stack) if layer.batch_dims]
    loss_at(2)(model).backward()
    with torch.no_grad():
        loss_at(1)(model)
    loss_at(1)(model)  # a forward pass without a backward pass
    wanted = expected_sums()
    for layer in layers:
        found = layer.input_sum, layer.output_sum
        torch.testing.assert_close(found, wanted[layer.name], rtol=1e-12, atol=1e-13)


def test_microbatches_add_up() -> None:
    model = mixture()
    layers = [layer for layer in tap(model, is_stack=_is_stack) if layer.batch_dims]
    tokens, choice, targets = batch(2)
    for part in (slice(0, 7), slice(7, None)):
        loss = ((model(tokens[part], choice[part]) - targets[part]) ** 2).sum() / TOKENS
        loss.backward()
    wanted = expected_sums()
    for layer in layers:
        found = layer.input_sum, layer.output_sum
        torch.testing.assert_close(found, wanted[layer.name], rtol=1e-12, atol=1e-13)


def test_compiled_products_inside_are_tapped() -> None:
    class Compiled(ByLinear):
        def forward(self, *args: Any) -> Tensor:
            return self.run(*args)

        @torch.compile(backend="eager")
        def run(self, rows: Tensor, counts: Tensor) -> Tensor:
            return ByLinear.forward(self, rows, counts)

    model = mixture(Compiled)
    found = measured(model)
    for name, wanted in expected_sums().items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-13)


# What torch's compiler says while it traces any autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_is_tapped() -> None:
    model: Any = mixture()
    layers = [layer for layer in tap(model, is_stack=_is_stack) if layer.batch_dims]
    loss_at(2)(torch.compile(model, backend="eager")).backward()
    wanted = expected_sums()
    for layer in layers:
        found = layer.input_sum, layer.output_sum
        torch.testing.assert_close(found, wanted[layer.name], rtol=1e-12, atol=1e-13)


def test_matrices_that_are_stored_transposed_are_refused_by_name() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.ones(EXPERTS, DIM, DIM))

        def forward(self, rows: Tensor) -> Tensor:
            return rows @ self.w1[1]

    model = Turned()
    tap(model, is_stack=_is_stack)
    with pytest.raises(ValueError, match=r"w1: got a stack that multiplies rows .*batch_dims"):
        model(torch.ones(2, DIM))


def test_products_that_no_tap_sees_are_an_error_in_the_first_step() -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.ones(EXPERTS, HIDDEN, DIM))

        def forward(self, rows: Tensor) -> Tensor:
            return torch.einsum("ni,eoi->neo", rows, self.w1)

    model = ByHand()
    optimizer = Eva(groups_of(model)[1:], model=model)
    model(torch.ones(2, DIM)).sum().backward()
    with pytest.raises(RuntimeError, match="w1: has a gradient, but its inputs were not seen"):
        optimizer.step()


@pytest.mark.parametrize("method", [FOOF, KFAC])
def test_methods_with_moments_leave_stacks_to_the_fallback(
    method: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = mixture()
    with pytest.raises(ValueError, match=r"batch_dims: .* takes no stacks of matrices"):
        method(groups_of(model), model=model)
    with caplog.at_level(logging.WARNING):
        optimizer = method(model.named_parameters(), model=model)
    assert "exp_avg" in optimizer.state[model.get_parameter("experts.w1")]
    assert "AdamW steps what cannot be tapped: experts.w1, experts.w2, experts.w3" in caplog.text
    assert "in a parameter group with batch_dims = 1" in caplog.text


def test_a_stack_in_no_group_of_stacks_is_left_to_the_fallback() -> None:
    model = mixture()
    optimizer = Eva(model.named_parameters(), model=model)
    stack = model.get_parameter("experts.w1")
    assert set(optimizer.state[stack]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("variant", ["clipped", "relative"])
@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_state_goes_on_bitwise(method: str, variant: str) -> None:
    def steps(model: Mixture, optimizer: LayerOptimizer, which: range) -> None:
        for step in which:
            optimizer.zero_grad()
            loss_at(step)(model).backward()
            optimizer.step()

    model = mixture()
    optimizer = make(method, model, **VARIANTS[variant])
    steps(model, optimizer, range(3))
    again = mixture()
    again.load_state_dict(model.state_dict())
    loaded = make(method, again, **VARIANTS[variant])
    loaded.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    twin, copied = copy.deepcopy((model, optimizer))
    for one, its in ((model, optimizer), (again, loaded), (twin, copied)):
        steps(one, its, range(3, STEPS))
    for other in (again, twin):
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_state_has_one_entry_for_each_expert() -> None:
    model = mixture()
    optimizer = make("Eva", model, damping_mode="relative")
    loss_at(0)(model).backward()
    optimizer.step()
    state = optimizer.sharded_state()["experts.w2"]
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "step": (EXPERTS,),
        "batches": (EXPERTS,),
        "input_mean": (EXPERTS, HIDDEN),
        "output_sum": (EXPERTS, DIM),
        "curvature_mean": (EXPERTS,),
        "momentum": (EXPERTS, DIM, HIDDEN),
    }
    assert state["batches"].tolist() == [1, 1, 1, 0]
    metrics = optimizer.layer_metrics()["experts.w2"]
    assert {key: value.shape for key, value in metrics.items()} == {"rho": (), "cosine": ()}


def test_a_pickled_model_loads_untapped_and_can_be_tapped() -> None:
    model = mixture()
    measured(model)
    again = pickle.loads(pickle.dumps(model))
    assert again.experts.forward.__func__ is type(again.experts).forward
    for name, wanted in expected_sums().items():
        torch.testing.assert_close(measured(again)[name], wanted, rtol=1e-12, atol=1e-13)


class Batched(nn.Module):
    """A stack of any number of experts, each given the same number of rows."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(normal(0, num_experts, HIDDEN, DIM))

    def forward(self, rows: Tensor) -> Tensor:
        return rows.bmm(self.weights.mT)


class Operations(TorchDispatchMode):
    """Counts the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations_of_a_step(method: str, num_experts: int) -> int:
    model = Batched(num_experts)
    optimizer = make(method, model)
    for step in range(2):
        model(normal(step, num_experts, 3, DIM)).square().sum().backward()
        with Operations() as counted:
            optimizer.step()
    return counted.count


@pytest.mark.parametrize("method", METHODS)
def test_a_step_has_no_more_operations_for_more_experts(method: str) -> None:
    assert operations_of_a_step(method, 2) == operations_of_a_step(method, 32)


# Layouts


def ddp(model: Mixture) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: Mixture) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.experts, model):
        fully_shard(module, mesh=mesh)
    return model


def hsdp(model: Mixture) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "fsdp"))
    for module in (model.experts, model):
        fully_shard(module, mesh=mesh)
    return model


def expert_parallel(
    model: Mixture, sizes: tuple[int, int, int], dim: int | None = None
) -> nn.Module:
    """As torchtitan: replicas, efsdp, ep; all else over all ranks but the replicas."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "efsdp", "ep"))
    parallelize_module(model.experts, mesh["ep"], ExpertParallel())
    inner = mesh["efsdp"] if sizes[0] == 1 else mesh["replicas", "efsdp"]
    place = None if dim is None else lambda _: Shard(dim)
    fully_shard(model.experts, mesh=inner, shard_placement_fn=place)
    flat = mesh["efsdp", "ep"]._flatten("fsdp")
    if sizes[0] > 1:
        whole = init_device_mesh("cpu", (sizes[0], flat.size()), mesh_dim_names=("r", "f"))
        fully_shard(model, mesh=whole)
    else:
        fully_shard(model, mesh=flat)
    return model


def ep(model: Mixture) -> nn.Module:
    return expert_parallel(model, (1, 1, 2))


def fsdp_ep(model: Mixture) -> nn.Module:
    return expert_parallel(model, (1, 2, 2))


def fsdp_ep_by_rows(model: Mixture) -> nn.Module:
    return expert_parallel(model, (1, 2, 2), dim=1)


def hsdp_ep(model: Mixture) -> nn.Module:
    return expert_parallel(model, (2, 1, 2))


def tp(model: Mixture) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallelize_module(model.experts, mesh, TensorParallel())

    def completed(part: Tensor) -> Tensor:
        sums = DTensor.from_local(part, mesh, [Partial()], run_check=False)
        whole = sums.redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Replicate()])

    model.completed = completed
    return model


CASES = (
    ("Eva", "clipped"),
    ("Eva", "relative"),
    ("EvaF", "unscaled"),
    ("EvaF", "relative, unscaled"),
    ("EvaS", "normalised"),
)
LAYOUTS: dict[str, tuple[int, Any]] = {
    "ddp 2": (2, ddp),
    "fsdp 2": (2, fsdp),
    "fsdp 3": (3, fsdp),
    "hsdp 2x2": (4, hsdp),
    "ep 2": (2, ep),
    "fsdp 2 x ep 2": (4, fsdp_ep),
    "fsdp 2 x ep 2, rows cut": (4, fsdp_ep_by_rows),
    "hsdp 2 x ep 2": (4, hsdp_ep),
    "tp 2": (2, tp),
}


def train(model: nn.Module, optimizer: LayerOptimizer, reader: int, num_readers: int) -> None:
    """Steps of two microbatches each on this reader's part, with an evaluation in between."""
    for step in range(1, 5):
        optimizer.zero_grad()
        parts = [t[reader::num_readers] for t in batch(step)]
        for tokens, choice, targets in zip(*[p.chunk(2) for p in parts], strict=True):
            loss = ((model(tokens, choice) - targets) ** 2).sum() / TOKENS
            if isinstance(model, DistributedDataParallel):
                loss = loss * num_readers  # which it divides gradients by
            loss.backward()
        with torch.no_grad():
            model(*batch(99)[:2])
        if isinstance(model, FSDPModule):
            model.reshard()  # the root stays gathered after an evaluation, with the old weights
        optimizer.step()


def values(model: nn.Module, optimizer: LayerOptimizer) -> Values:
    """Weights, and the state of stacks."""
    found = {name: whole(param) for name, param in model.named_parameters()}
    for name, state in optimizer.sharded_state().items():
        if "experts" in name:
            found |= {f"{name}.{key}": whole(value) for key, value in state.items()}
    return {name.removeprefix("module."): value for name, value in found.items()}


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train_layout(layout: str) -> dict[tuple[str, str], tuple[Values, Any]]:
    found = {}
    for method, variant in CASES:
        model = LAYOUTS[layout][1](mixture())
        sum_gradients(model)
        optimizer = make(method, model, **VARIANTS[variant])
        readers = (0, 1) if layout == "tp 2" else (dist.get_rank(), dist.get_world_size())
        train(model, optimizer, *readers)
        numbers = {
            name.removeprefix("module."): {key: float(value) for key, value in metrics.items()}
            for name, metrics in optimizer.layer_metrics().items()
        }
        found[method, variant] = values(model, optimizer), numbers
    return found


QUICK = ("fsdp 3", "fsdp 2 x ep 2, rows cut", "tp 2")  # the others are parts of these


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS],
)
def test_iterates_and_state_equal_those_of_one_process(layout: str) -> None:
    results = run_on_ranks(LAYOUTS[layout][0], train_layout, layout)
    for method, variant in CASES:
        model = mixture()
        optimizer = make(method, model, **VARIANTS[variant])
        train(model, optimizer, 0, 1)
        metrics = optimizer.layer_metrics()
        for result in results:
            found, numbers = result[method, variant]
            for name, tensor in values(model, optimizer).items():
                error = (found[name] - tensor).norm() / max(tensor.norm(), 1e-30)
                assert error <= 1e-12, f"{method}, {variant}, {name}: {error:.1e}"
            for name, wanted in metrics.items():
                for key, value in wanted.items():
                    assert numbers[name][key] == pytest.approx(float(value), rel=1e-11)


def collectives_of_a_step(layout: str) -> int:
    model = LAYOUTS[layout][1](mixture())
    sum_gradients(model)
    optimizer = make("Eva", model)
    for _ in range(2):
        optimizer.zero_grad()
        tokens, choice, targets = (part[dist.get_rank() :: 4] for part in batch(2))
        ((model(tokens, choice) - targets) ** 2).sum().backward()
        with CommDebugMode() as mode:
            optimizer.step()
    return mode.get_total_counts()


def test_experts_add_one_sum_for_each_group_of_ranks_of_their_own() -> None:
    check, dense, experts = 1, 2, 1  # statistics; scalars travel with those of all other layers
    assert run_on_ranks(4, collectives_of_a_step, "fsdp 2 x ep 2") == [check + dense + experts] * 4
