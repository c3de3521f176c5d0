"""Taps under activation checkpointing and torch.compile count every row once."""

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from titan_shampoo.statistics import TappedLayer, tap

NAMES = ("input_sum", "output_sum", "input_moment", "output_moment")
BATCH = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

pytestmark = [
    pytest.mark.filterwarnings(warning)
    for warning in (
        # What torch's compiler says while it traces any autograd function.
        "ignore:.*should not be instantiated:DeprecationWarning",
        # and at the input of any block but the first.
        "ignore:The .grad attribute of a Tensor that is not a leaf",
        # Compiled selective checkpointing reminds of in-place operations: there are none here.
        "ignore:Detected that context_fn is passed",
    )
]


class Block(nn.Module):
    """Two layers on one input, and one behind them, as in a transformer."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 10)
        self.up = nn.Linear(6, 10, bias=False)
        self.down = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


class Recomputed(nn.Module):
    """Reentrant checkpointing, which back-propagates inside of the backward pass."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        return checkpoint(self.block, x, use_reentrant=True)


Wrap = Callable[[nn.Module], nn.Module]


def every_second_mm() -> tuple[object, object]:
    """torchtitan's policy: of the matrix products, every second one is saved."""
    counts: Counter[str] = Counter()

    def policy(context, operation, *args, **kwargs):
        mode = "recomputed" if context.is_recompute else "forward"
        is_product = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        counts[mode] += is_product
        save = is_product and counts[mode] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def selective(block: nn.Module) -> nn.Module:
    return checkpoint_wrapper(block, context_fn=every_second_mm)


def compiled(block: nn.Module, backend: str | Callable[..., object] = "aot_eager") -> nn.Module:
    wrapped = torch.compile(block, fullgraph=True, backend=backend)
    assert isinstance(wrapped, nn.Module)
    return wrapped


WRAPS: dict[str, Wrap] = {
    "checkpoint": checkpoint_wrapper,
    "reentrant": Recomputed,
    "selective": selective,
    "compile": compiled,
    "compile-checkpoint": lambda block: compiled(checkpoint_wrapper(block)),
    "compile-selective": lambda block: compiled(selective(block)),
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def make_model(wrap: Wrap = lambda block: block) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(wrap(Block().double()) for _ in range(3)))


def train(model: nn.Module, batch: Tensor = BATCH) -> None:
    model(batch).sin().sum().backward()


def collected(model: nn.Module) -> list[TappedLayer]:
    layers = tap(model, moments="both")
    for layer in layers:
        layer.collects_moments = True
    return layers


@functools.cache
def expected() -> list[dict[str, Tensor]]:
    model = make_model()
    layers = collected(model)
    train(model)
    return [{name: getattr(layer, name) for name in NAMES} for layer in layers]


def verify(layers: list[TappedLayer], factor: int = 1) -> None:
    for layer, wanted in zip(layers, expected(), strict=True):
        for name in NAMES:
            torch.testing.assert_close(getattr(layer, name), factor * wanted[name])


@pytest.mark.parametrize("wrap", WRAPS)
def test_every_row_is_counted_once_and_accumulates(wrap):
    model = make_model(WRAPS[wrap])
    layers = collected(model)
    train(model)
    verify(layers)
    train(model)  # gate and up share an input: their sums must not share memory
    verify(layers, 2)
    for layer in layers:
        layer.reset()
    with torch.no_grad():
        model(BATCH)
    train(model)
    verify(layers)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["plain", "checkpoint", "selective"])
def test_inductor_counts_every_row_once_and_accumulates(inner):
    inner_wrap = WRAPS.get(inner, lambda block: block)
    model = make_model(lambda block: compiled(inner_wrap(block), "inductor"))
    layers = collected(model)
    train(model)
    verify(layers)
    train(model)
    verify(layers, 2)


def test_names_do_not_depend_on_wrappers():
    plain = [layer.name for layer in tap(make_model())]
    assert plain[:4] == ["0.gate", "0.up", "0.down", "1.gate"]
    assert [layer.name for layer in tap(make_model(lambda b: compiled(selective(b))))] == plain


def test_equal_blocks_share_one_graph_for_each_value_of_collects_moments():
    backend = CompileCounter()
    model = make_model(functools.partial(compiled, backend=backend))
    layers = tap(model, moments="both")
    for collects in (False, True, False, True):
        for layer in layers:
            layer.collects_moments = collects
        train(model, BATCH.clone().requires_grad_())  # or the first block has a graph of its own
    assert backend.frame_count == 2


def test_moments_are_formed_only_while_they_are_collected():
    model = make_model()
    layers = tap(model, moments="input")
    products = CountProducts()
    with products:
        train(model)
    without = products.count
    assert {layer.input_moment for layer in layers} == {None}
    for layer in layers:
        layer.collects_moments = True
    with products:
        train(model)
    assert products.count == 2 * without + len(layers)
    assert all(layer.output_moment is None for layer in layers)


def test_compiled_model_that_has_run_already_can_be_tapped():
    model = make_model(compiled)
    train(model)
    layers = collected(model)
    train(model)
    verify(layers)


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wrap", ["checkpoint", "reentrant", "selective"])
def test_taps_change_no_matrix_product_of_forward_and_backward(wrap):
    counts = []
    for tapped in (False, True):
        model = make_model(WRAPS[wrap])
        if tapped:
            tap(model, moments="both")
        for mode in (CountProducts(), CountProducts()):
            with mode:
                train(model)
            counts.append(mode.count)
    assert len(set(counts)) == 1
    assert counts[0] > 0
