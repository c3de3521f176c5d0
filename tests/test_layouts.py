"""Every layout of parameters gives the iterates of one process, to rounding.

Gradients are given, so that only the optimizer is under test; float64, so that any difference in
what is computed, and not only in its order, shows. All layouts of as many ranks share one run.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.support.block_layouts import (
    LAYOUTS,
    METHODS,
    OPTIONS,
    SHAPES,
    Layout,
    Placer,
    full_tensors,
    gradients,
    plain,
)
from tests.support.ranks import run_on_ranks
from titan_shampoo.titan.initialization import local_part

STEPS = 20


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the ranks have: eigenvectors depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Parts = dict[str, tuple[Tensor, Tensor]]
"""What a rank holds of each parameter: positions in the flat whole, and values, flat."""


def train(
    layout: Layout, method: str, options: Mapping[str, Any], *, disturbed: bool = False
) -> Parts:
    """What this rank holds after STEPS steps, with weights that others write if ``disturbed``."""
    start, placed = full_tensors(0), layout.placed
    params = {name: torch.nn.Parameter(placed(name, start[name])) for name in layout.names}
    if "frozen" in params:
        params["frozen"].requires_grad_(False)
    make, own = METHODS[method]
    optimizer = make(params.items(), **{**OPTIONS, **own, **options, **layout.distribution})
    for step in range(1, STEPS + 1):
        grads = gradients(step)
        for name, param in params.items():
            param.grad = placed(name, grads[name]) if name in grads else None
        optimizer.step()
        if disturbed:
            disturb(step, params, placed)
    return {name: part_of(param.detach()) for name, param in params.items()}


@torch.no_grad()
def disturb(step: int, params: Mapping[str, torch.nn.Parameter], placed: Placer) -> None:
    """Load weights after step 7, swap an average in after step 11, and out after step 12."""
    others = full_tensors(100)
    for name, param in params.items():
        other = placed(name, others[name])
        if step == 7:
            param.copy_(other)
        elif step == 11:
            param.lerp_(other, 0.5)
        elif step == 12:
            param.lerp_(other, -1.0)


def part_of(tensor: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(tensor.numel()).view(tensor.shape)
    if isinstance(tensor, DTensor):
        return local_part(positions, tensor).flatten(), tensor.to_local().flatten()
    return positions.flatten(), tensor.flatten()


def put_together(ranks: Sequence[Parts]) -> dict[str, Tensor]:
    """Whole parameters; what several ranks hold must be equal, bit by bit."""
    found = {}
    for name, shape in SHAPES.items():
        whole = torch.full(shape, torch.nan, dtype=torch.float64).flatten()
        for parts in ranks:
            if name in parts:
                positions, values = parts[name]
                before = whole[positions]
                assert torch.equal(before.where(~before.isnan(), values), values), name
                whole[positions] = values
        assert not whole.isnan().any(), f"{name}: no rank holds a part"
        found[name] = whole.view(shape)
    return found


def train_layouts(
    names: Sequence[str],
    methods: Sequence[str],
    options: Mapping[str, Any],
    disturbed: bool = False,
) -> dict[tuple[str, str], Parts]:
    """What this rank holds after training by each method in each layout."""
    layouts = LAYOUTS[dist.get_world_size()]
    found = {}
    for name in names:
        layout = layouts[name]()
        for method in methods:
            found[name, method] = train(layout, method, options, disturbed=disturbed)
    return found


@functools.cache
def trained(ranks: int) -> list[dict[tuple[str, str], Parts]]:
    return run_on_ranks(ranks, train_layouts, list(LAYOUTS[ranks]), list(METHODS), {})


@functools.cache
def trained_alone(method: str) -> dict[str, Tensor]:
    return put_together([train(Layout(plain), method, {})])


def assert_equal(mine: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in expected.items():
        error = (mine[name] - tensor).norm() / tensor.norm()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("ranks", "layout"), [(ranks, layout) for ranks in LAYOUTS for layout in LAYOUTS[ranks]]
)
def test_iterates_equal_those_of_one_process(ranks: int, layout: str, method: str) -> None:
    whole = put_together([parts[layout, method] for parts in trained(ranks)])
    assert_equal(whole, trained_alone(method), 1e-12)


def test_weights_that_others_write_between_steps_are_respected() -> None:
    layouts, methods = ["fsdp", "hsdp 2x2", "mixed"], ["Shampoo", "SOAP"]
    results = run_on_ranks(4, train_layouts, layouts, methods, {}, True)
    for method in methods:
        expected = put_together([train(Layout(plain), method, {}, disturbed=True)])
        assert not torch.allclose(expected["square"], trained_alone(method)["square"])
        for layout in layouts:
            whole = put_together([parts[layout, method] for parts in results])
            assert_equal(whole, expected, 1e-12)


OF_OPTIONS: list[dict[str, Any]] = [
    {"block_size": 1024, "refresh": "together"},
    {"block_size": (2, 5), "grafting": "sgd", "weight_decay_type": "l2"},
    {"merge": "paper", "block_size": 12, "fallback": None},
    {"merge": "none", "block_size": 3, "nesterov": True},
]


def train_options(layout: str, some: Sequence[Mapping[str, Any]]) -> list[Parts]:
    return [train_layouts([layout], ["Shampoo"], o)[layout, "Shampoo"] for o in some]


@pytest.mark.parametrize(("ranks", "layout"), [(3, "fsdp"), (4, "hsdp 2x2")])
def test_options_do_not_depend_on_the_layout(ranks: int, layout: str) -> None:
    results = run_on_ranks(ranks, train_options, layout, OF_OPTIONS)
    for number, options in enumerate(OF_OPTIONS):
        expected = put_together([train(Layout(plain), "Shampoo", options)])
        assert_equal(put_together([parts[number] for parts in results]), expected, 1e-11)


@pytest.mark.parametrize(("ranks", "layout"), [(4, "hsdp 2x2"), (3, "fsdp"), (2, "ddp")])
def test_messages_in_bfloat16_cost_little_and_leave_replicas_equal(ranks: int, layout: str) -> None:
    options = {"communication_dtype": torch.bfloat16, "lr": 1e-3}
    expected = put_together([train(Layout(plain), "Shampoo", {"lr": 1e-3})])
    results = run_on_ranks(ranks, train_layouts, [layout], ["Shampoo"], options)
    found = put_together([parts[layout, "Shampoo"] for parts in results])
    assert_equal(found, expected, 1e-2)
    # Not each of them: under FSDP2 no block of a square travels.
    assert any(not torch.equal(found[n], expected[n]) for n in expected), "the option does nothing"
