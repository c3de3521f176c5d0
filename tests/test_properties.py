"""What the methods promise for gradients nobody chose: bounded steps, symmetries, finiteness."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_shampoo import SOAP, KLShampoo, Shampoo
from titan_shampoo.blocks.optimizer import BlockOptimizer

METHODS: dict[str, type[BlockOptimizer]] = {
    "Shampoo": Shampoo,
    "SOAP": SOAP,
    "KLShampoo": KLShampoo,
}
WHOLE: dict[str, Any] = {"lr": 1.0, "fallback": None}

extents = st.integers(1, 6)
seeds = st.integers(0, 2**31)
few = settings(max_examples=25, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stream(seed: int, rows: int, columns: int, steps: int = 8) -> list[Tensor]:
    """Gradients with some drift."""
    drift = noise(seed, rows, columns)
    return [drift + noise(seed + step, rows, columns) for step in range(1, steps + 1)]


def orthogonal(seed: int, extent: int) -> Tensor:
    return torch.linalg.qr(noise(seed, extent, extent))[0]


def path(
    method: str, grads: Sequence[Tensor], options: dict[str, Any], start: Tensor | None = None
) -> Tensor:
    """Iterates of one matrix, from zero unless ``start`` is given, ``(steps + 1, *shape)``."""
    weight = torch.nn.Parameter(torch.zeros_like(grads[0]) if start is None else start.clone())
    make: Any = METHODS[method]
    optimizer = make([("w", weight)], **WHOLE | options)
    found = [weight.detach().clone()]
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
        found.append(weight.detach().clone())
    return torch.stack(found)


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-8) -> None:
    scale = max(1.0, float(other.abs().max()))
    assert float((one - other).abs().max()) <= tolerance * scale


SLOW = {((64, 1024), 1), ((64, 1024), 3), ((64, 1024), 10)}
BOUNDED = [
    pytest.param(shape, period, marks=pytest.mark.slow if (shape, period) in SLOW else ())
    for shape in ((64,), (64, 64), (64, 256), (64, 1024))
    for period in (1, 3, 10)
]


@pytest.mark.parametrize("refresh", ["staggered", "together"])
@pytest.mark.parametrize("basis_method", ["eigh", "qr"])
@pytest.mark.parametrize(("shape", "period"), BOUNDED)
def test_soap_takes_no_step_above_20(
    shape: tuple[int, ...], period: int, basis_method: str, refresh: str
) -> None:
    """With two equal parameters, so that staggered turns differ."""
    lr = 0.5
    params = {name: torch.nn.Parameter(torch.zeros(shape)) for name in ("a", "b")}
    optimizer = SOAP(
        params.items(),
        lr=lr,
        precondition_frequency=period,
        basis_method=basis_method,  # type: ignore[arg-type]
        refresh=refresh,  # type: ignore[arg-type]
        fallback=None,
    )
    drift = noise(0, *shape, dtype=torch.float32)
    for step in range(1, 61):
        before = {name: param.detach().clone() for name, param in params.items()}
        for number, param in enumerate(params.values()):
            param.grad = drift + noise(2 * step + number, *shape, dtype=torch.float32)
        optimizer.step()
        for name, param in params.items():
            largest = float((param.detach() - before[name]).abs().max()) / lr
            assert largest < 20, f"step {step} of {name}"


@few
@given(extents, extents, seeds, st.sampled_from([None, "sgd"]), st.integers(1, 4))
def test_shampoo_does_not_depend_on_the_coordinates(
    rows: int, columns: int, seed: int, grafting: str | None, period: int
) -> None:
    left, right = orthogonal(seed + 1, rows), orthogonal(seed + 2, columns)
    options = {"grafting": grafting, "precondition_frequency": period, "eps": 1e-3}
    grads = stream(seed, rows, columns)
    turned = path("Shampoo", [left @ grad @ right.T for grad in grads], options)
    assert_close(turned, left @ path("Shampoo", grads, options) @ right.T)


@few
@given(extents, extents, seeds, st.floats(-3, 3), st.sampled_from([None, "sgd", "adam"]))
def test_shampoo_scales_as_its_grafted_method(
    rows: int, columns: int, seed: int, decimals: float, grafting: str | None
) -> None:
    """Without grafting the scale of the gradients cancels, as it does with Adam's length."""
    scale = 10.0**decimals
    options = {"grafting": grafting, "precondition_frequency": 2, "start_step": 1}
    grads = stream(seed, rows, columns)
    small = path("Shampoo", grads, options | {"eps": 1e-3, "grafting_eps": 1e-6})
    damping = {"eps": 1e-3 * scale**2, "grafting_eps": 1e-6 * scale}
    large = path("Shampoo", [scale * grad for grad in grads], options | damping)
    assert_close(large / (scale if grafting == "sgd" else 1.0), small)


@few
@given(extents, seeds, st.floats(-3, 3), st.sampled_from(["eigh", "qr"]))
def test_soap_does_not_depend_on_the_scale_of_gradients(
    extent: int, seed: int, decimals: float, basis_method: str
) -> None:
    scale = 10.0**decimals
    options = {"precondition_frequency": 2, "basis_method": basis_method, "start_step": 3}
    grads = stream(seed, extent, extent)
    small = path("SOAP", grads, options | {"eps": 1e-3})
    large = path("SOAP", [scale * grad for grad in grads], options | {"eps": 1e-3 * scale})
    assert_close(large, small, 1e-6)


TRANSPOSED: dict[str, dict[str, Any]] = {
    "Shampoo": {"eps": 1e-3, "grafting": "adam"},
    "KLShampoo": {"grafting": None},
    "SOAP": {"start_step": 7, "eps": 1e-3},
}
"""SOAP begins when the factors have full rank: before that its basis is arbitrary."""


@pytest.mark.parametrize("method", METHODS)
def test_transposed_gradients_give_transposed_steps(method: str) -> None:
    @few
    @given(extents, extents, seeds, st.integers(2, 6))
    def check(rows: int, columns: int, seed: int, block_size: int) -> None:
        options = {"block_size": block_size, "precondition_frequency": 2, "refresh": "together"}
        grads = stream(seed, rows, columns, steps=10)
        one = path(method, grads, options | TRANSPOSED[method])
        other = path(method, [grad.T for grad in grads], options | TRANSPOSED[method])
        assert_close(other.mT, one, 1e-6)

    check()


ZERO_GRADIENT_OPTIONS = [
    *[("Shampoo", {"grafting": g}) for g in (None, "sgd", "adagrad", "rmsprop", "adam")],
    ("Shampoo", {"root_method": "newton"}),
    ("Shampoo", {"eps_relative": 1e-6}),
    *[("SOAP", {"basis_method": basis}) for basis in ("eigh", "qr")],
    *[("KLShampoo", {"grafting": g}) for g in (None, "adam")],
]


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("method", "options"), ZERO_GRADIENT_OPTIONS)
def test_zero_gradients_change_nothing_but_decay(
    method: str, options: dict[str, Any], decay: float
) -> None:
    start = noise(3, 7, 5, dtype=torch.float32)
    zeros = [torch.zeros(7, 5)] * 12
    options = options | {"weight_decay": decay, "lr": 0.5, "precondition_frequency": 3}
    # From step 2 on: the step in which SOAP makes its first basis is not decayed.
    found = path(method, zeros, options | {"block_size": 4, "start_step": 2}, start)
    expected = start
    for weight in found[1:]:
        expected = expected - 0.5 * (decay * expected)
        assert torch.allclose(weight, expected, rtol=1e-6, atol=0)
        assert decay or torch.equal(weight, start)


def rank_one(seed: int, rows: int, columns: int) -> Callable[[int], Tensor]:
    left, right = noise(seed, rows, 1), noise(seed + 1, 1, columns)
    return lambda step: left @ right


def ill_conditioned(seed: int, rows: int, columns: int) -> Callable[[int], Tensor]:
    """Rows of 1e-12 to 1 in coordinates that are not the axes."""
    left, right = orthogonal(seed, rows), orthogonal(seed + 1, columns)
    sizes = torch.logspace(0, -12, rows, dtype=torch.float64)[:, None]
    return lambda step: left @ (sizes * noise(seed + 2 + step, rows, columns)) @ right


@pytest.mark.parametrize("make", [rank_one, ill_conditioned])
@pytest.mark.parametrize("method", METHODS)
def test_hard_streams_stay_finite_in_float32(
    method: str, make: Callable[[int, int, int], Callable[[int], Tensor]]
) -> None:
    @few
    @given(st.integers(2, 24), st.integers(2, 24), seeds, st.integers(1, 3), st.floats(-12, 6))
    def check(rows: int, columns: int, seed: int, period: int, decimals: float) -> None:
        gradient = make(seed, rows, columns)
        weight = torch.nn.Parameter(torch.zeros(rows, columns))
        build: Any = METHODS[method]
        optimizer = build([("w", weight)], lr=1e-2, precondition_frequency=period)
        for step in range(12):
            weight.grad = (10.0**decimals * gradient(step)).float()
            optimizer.step()
            assert weight.isfinite().all(), f"step {step + 1}"
        assert all(value.isfinite().all() for value in optimizer.state[weight].values())
        assert optimizer.skipped_steps == 0
        assert optimizer.failed_refreshes == 0

    check()
