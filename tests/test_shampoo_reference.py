"""Shampoo gives the iterates of its naive dense float64 reference, for every option.

Rank-deficient factors amplify rounding, so a case may differ by a multiple of what the reference
itself makes of gradients (and, in float32, of factors) changed by rounding; a case for which that
is no sharp test fails as well.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference import shampoo as reference
from tests.reference.blocks import Array
from titan_shampoo import Shampoo
from titan_shampoo.functional.roots import inverse_root

SHAPES: dict[str, tuple[int, ...]] = {
    "vector": (7,),
    "one": (1,),
    "scalar": (),
    "small": (12, 9),
    "wide": (5, 16),
    "row": (1, 6),
    "column": (6, 1),
    "conv": (6, 4, 3, 3),
    "pointwise": (8, 3, 1, 1),
    "tall": (24, 10),
}
STACKS: dict[str, tuple[int, ...]] = {"experts": (3, 7, 4), "lone_expert": (1, 4, 6)}
STEPS = 20
SAMPLES = 4
LR = 0.1
BASE: dict[str, Any] = {
    "betas": (0.9, 0.95),
    "eps": 1e-4,
    "block_size": 5,
    "precondition_frequency": 3,
    "refresh": "staggered",
    "grafting": None,
}
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "small damping": {"eps": 1e-12, "start_step": 9},
    "paper, whole": {"merge": "paper", "block_size": 1024, "eps": 1e-2},
    "paper, cut": {"merge": "paper", "block_size": 12},
    "paper, nothing merged": {"merge": "paper", "block_size": 8},
    "not merged": {"merge": "none"},
    "not merged, pair": {"merge": "none", "block_size": (4, 2)},
    "blocks that divide": {"block_size": 3},
    "blocks of one element": {"block_size": 1},
    "whole matrices": {"block_size": 1024},
    "pair": {"block_size": (4, 7)},
    "pair, rows whole": {"block_size": (64, 3)},
    "no filtered gradient": {"betas": (0.0, 0.95)},
    "summed factors": {"betas": (0.9, 1.0)},
    "beta3": {"beta3": 0.5},
    "beta3 above beta1": {"beta3": 0.99},
    "relative damping": {"eps_relative": 1e-3},
    "no bias correction": {"bias_correction": False},
    "no bias correction, beta3": {"bias_correction": False, "beta3": 0.5, "grafting": "adam"},
    "from step 1": {"start_step": 1},
    "from step 5": {"start_step": 5},
    "from step 5, together": {"start_step": 5, "refresh": "together"},
    "from step 1, together": {"start_step": 1, "refresh": "together"},
    "together": {"refresh": "together"},
    "in every step": {"precondition_frequency": 1},
    "never": {"precondition_frequency": 100},
    "one power": {"exponent": 0.5},
    "power per dim": {"exponent": (0.5, 0.25), "merge": "matrix"},
    "left only": {"exponent": (0.5, 0.0), "grafting": "adam"},
    "right only": {"exponent": (0.0, 0.5), "grafting": "adam"},
    "power per dim, three dims": {"exponent": (0.2, 0.0, 0.4, 0.3), "merge": "none"},
    "newton": {"root_method": "newton", "eps": 1e-2},
    "newton, orders up to 4": {"root_method": "newton", "eps": 1e-2, "merge": "none"},
    "newton, power": {"root_method": "newton", "eps": 1e-2, "exponent": 0.5},
    "eigh": {"root_method": "eigh"},
    "factors every 2nd step": {"factor_frequency": 2, "precondition_frequency": 4},
    "factors every 3rd step, together": {
        "factor_frequency": 3,
        "refresh": "together",
        "grafting": "adam",
        "grafting_beta2": None,
    },
    "matched length": {"match_rms": 0.2, "precondition_frequency": 4},
}
CASES |= {
    f"grafting {method}, {refresh}": {
        "grafting": method,
        "grafting_beta2": 0.8,
        "grafting_eps": 1e-3,
        "refresh": refresh,
    }
    for method in ("sgd", "adagrad", "rmsprop", "adam")
    for refresh in ("staggered", "together")
}
CASES |= {
    f"decay {kind}, {grafting}": {
        "weight_decay": 0.3,
        "weight_decay_type": kind,
        "grafting": grafting,
        "momentum": 0.5,
    }
    for kind in ("l2", "decoupled", "corrected", "independent")
    for grafting in (None, "adam")
}
CASES |= {
    "momentum": {"momentum": 0.7},
    "dampening": {"momentum": 0.7, "dampening": 0.4},
    "nesterov": {"momentum": 0.7, "nesterov": True},
    "nesterov, dampening": {"momentum": 0.7, "dampening": 0.4, "nesterov": True},
    "grafting moments as the factors": {"grafting": "adam", "grafting_beta2": None},
}

Iterates = list[dict[str, Array]]


class Float32Block(reference.Block):
    """Keeps its factors in float32, which gives rank-deficient ones a small, wrong full rank."""

    def accumulate(self, grad: Array) -> None:
        super().accumulate(grad)
        self.factors = [factor.astype(np.float32).astype(np.float64) for factor in self.factors]


class Float32Shampoo(reference.Shampoo):
    block_type = Float32Block


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def has_gradient(name: str, step: int) -> bool:
    """Some miss every fourth step, one comes late, one pauses longer than a period."""
    absent = {
        "small": step % 4 == 2,
        "vector": step % 4 == 2,
        "tall": step < 6,
        "wide": 7 <= step < 12,
        "experts": step == 1,
    }
    return not absent.get(name, False)


def weights_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Start values that float32 represents."""
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(rng.standard_normal(shape), np.float32).astype(np.float64)
        for name, shape in shapes.items()
    }


def gradients(shapes: Mapping[str, tuple[int, ...]], step: int) -> dict[str, Array]:
    """Drift and noise of uneven size along each dim."""
    drift, noise = np.random.default_rng(1), np.random.default_rng(100 + step)
    grads = {}
    for name, shape in shapes.items():
        grad = np.asarray(drift.standard_normal(shape) + noise.standard_normal(shape))
        for dim, size in enumerate(shape):
            grad = grad * np.geomspace(1, 3, size).reshape(-1, *[1] * (len(shape) - dim - 1))
        if has_gradient(name, step):
            grads[name] = grad
    return grads


def learning_rate(step: int) -> float:
    return LR * (1 - step / (2 * STEPS))


def disturbed(
    grads: Mapping[str, Array], step: int, size: float, seed: int = 0
) -> dict[str, Array]:
    rng = np.random.default_rng(500 + step + 1000 * seed)
    return {
        name: np.asarray(g * (1 + size * rng.standard_normal(g.shape))) for name, g in grads.items()
    }


def library_iterates(
    shapes: Mapping[str, tuple[int, ...]],
    options: Mapping[str, Any],
    dtype: torch.dtype = torch.float64,
) -> tuple[Iterates, dict[tuple[str, int], int]]:
    """Weights after each step, and the turn of each block."""
    params = {
        name: torch.nn.Parameter(torch.from_numpy(w.copy()).to(dtype))
        for name, w in weights_of(shapes).items()
    }
    optimizer = Shampoo(params.items(), lr=LR, fallback=None, **options)
    iterates = []
    for step in range(1, STEPS + 1):
        grads = gradients(shapes, step)
        for name, param in params.items():
            param.grad = torch.from_numpy(grads[name]).to(dtype) if name in grads else None
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        iterates.append({n: p.detach().double().numpy().copy() for n, p in params.items()})
    engine = optimizer._engine
    assert engine is not None
    names = list(params)
    return iterates, {(names[b.param], b.index): b.slot for b in engine.plan.blocks}


def reference_iterates(
    shapes: Mapping[str, tuple[int, ...]],
    options: Mapping[str, Any],
    turns: Mapping[tuple[str, int], int] | None,
    change: Callable[[dict[str, Array], int], dict[str, Array]] = lambda grads, step: grads,
    method: type[reference.Shampoo] = reference.Shampoo,
) -> Iterates:
    """The same by the reference, with the gradients passed through ``change``."""
    options = dict(options)
    if options.pop("refresh") == "together":
        turns = None
    options["grafting"] = options["grafting"] or "none"
    if options.get("grafting_beta2") is None:
        options["grafting_beta2"] = options["betas"][1]
    optimizer = method(weights_of(shapes), reference.Options(**options), peak_lr=LR, turns=turns)
    iterates = []
    for step in range(1, STEPS + 1):
        optimizer.step(change(gradients(shapes, step), step), learning_rate(step))
        iterates.append({name: weight.copy() for name, weight in optimizer.weights.items()})
    return iterates


def largest_errors(mine: Iterates, expected: Iterates, start: dict[str, Array]) -> dict[str, float]:
    """Largest difference of each weight, relative to the length of the way to that step."""
    errors = dict.fromkeys(start, 0.0)
    for some, others in zip(mine, expected, strict=True):
        for name, first in start.items():
            way = float(np.linalg.norm(others[name] - first))
            difference = float(np.linalg.norm(some[name] - others[name]))
            if difference > 0:
                assert way > 0, f"{name} moved without a gradient"
                errors[name] = max(errors[name], difference / way)
    return errors


def assert_follows_reference(
    shapes: Mapping[str, tuple[int, ...]],
    options: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
) -> None:
    """Compare 20 iterates with the reference, which sees gradients and factors in float64."""
    exact = dtype == torch.float64
    rounding, tolerance, multiple, sharpness = (
        (1e-15, 1e-10, 100, 1e-6) if exact else (6e-8, 2e-6, 20, 1e-3)
    )
    method = Float32Shampoo if factor_dtype == torch.float32 else reference.Shampoo
    mine, turns = library_iterates(shapes, {**options, "factor_dtype": factor_dtype}, dtype)
    expected = reference_iterates(shapes, options, turns)
    start = weights_of(shapes)
    errors = largest_errors(mine, expected, start)

    def response(seed: int) -> dict[str, float]:
        noisy = reference_iterates(
            shapes, options, turns, lambda g, step: disturbed(g, step, rounding, seed), method
        )
        return largest_errors(noisy, expected, start)

    assert_within_response(errors, response, tolerance, multiple, sharpness)


def assert_within_response(
    errors: Mapping[str, float],
    response: Callable[[int], Mapping[str, float]],
    tolerance: float,
    multiple: float,
    sharpness: float,
) -> None:
    """No error is above a multiple of the reference's own response to rounding.

    A response is a sample: where the first is not enough, the largest of some counts.
    """
    responses = dict(response(0))
    for seed in range(1, SAMPLES):
        if all(e <= max(tolerance, multiple * responses[n]) for n, e in errors.items()):
            break
        responses = {name: max(value, responses[name]) for name, value in response(seed).items()}
    for name, error in errors.items():
        allowed = max(tolerance, multiple * responses[name])
        assert allowed <= sharpness, f"{name}: the reference itself answers {responses[name]:.1e}"
        assert error <= allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_iterates_equal_the_reference(case: str) -> None:
    assert_follows_reference(SHAPES, BASE | CASES[case])


def test_an_eigenvalue_below_zero_is_lifted_to_the_damping() -> None:
    rows = np.random.default_rng(2).standard_normal((6, 6))
    indefinite = rows @ rows.T - 2.0 * np.eye(6)
    assert np.linalg.eigvalsh(indefinite)[0] < -0.1
    mine, _ = inverse_root(torch.from_numpy(indefinite)[None], 0.25, eps=1e-2, method="eigh")
    expected = reference.root_by_eigh(indefinite, 0.25, 1e-2)
    assert np.abs(mine[0].numpy() - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("options", [
    {},
    {"block_size": 3, "refresh": "together", "grafting": "adam"},
    {"block_size": (4, 2), "merge": "none", "weight_decay": 0.1, "momentum": 0.5},
])  # fmt: skip
def test_stacks_of_experts_are_cut_slice_by_slice(options: dict[str, Any]) -> None:
    assert_follows_reference(STACKS, BASE | {"batch_dims": 1} | options)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [
    {},
    {"grafting": "adam", "refresh": "together"},
    {"root_method": "newton"},
    {"merge": "none", "weight_decay": 0.1, "momentum": 0.5},
])  # fmt: skip
def test_float32_iterates_equal_the_reference_within_20_times_its_response_to_rounding(
    options: dict[str, Any], factor_dtype: torch.dtype
) -> None:
    assert_follows_reference(
        SHAPES, BASE | {"eps": 1.0} | options, dtype=torch.float32, factor_dtype=factor_dtype
    )
