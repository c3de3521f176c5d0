"""Twenty iterates of a method for blocks beside those of its float64 reference."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from tests.reference import shampoo as reference
from tests.reference.blocks import Array
from tests.support.internals import turns_of
from titan_shampoo.blocks.optimizer import BlockOptimizer

Shapes = Mapping[str, tuple[int, ...]]
Iterates = list[dict[str, Array]]

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
ROUNDING, TOLERANCE, MULTIPLE, SHARPNESS = 1e-15, 1e-10, 100, 1e-6


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
    method: type[BlockOptimizer],
    shapes: Shapes,
    options: Mapping[str, Any],
    dtype: torch.dtype = torch.float64,
) -> tuple[Iterates, dict[tuple[str, int], int]]:
    """Weights after each step, and the turn of each block."""
    params = {
        name: torch.nn.Parameter(torch.from_numpy(w.copy()).to(dtype))
        for name, w in weights_of(shapes).items()
    }
    make: Any = method  # the subclasses take options, their base a dictionary of them
    optimizer: BlockOptimizer = make(params.items(), lr=LR, fallback=None, **options)
    iterates = []
    for step in range(1, STEPS + 1):
        grads = gradients(shapes, step)
        for name, param in params.items():
            param.grad = torch.from_numpy(grads[name]).to(dtype) if name in grads else None
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        iterates.append({n: p.detach().double().numpy().copy() for n, p in params.items()})
    return iterates, turns_of(optimizer)


def reference_iterates(
    shapes: Mapping[str, tuple[int, ...]],
    options: Mapping[str, Any],
    turns: Mapping[tuple[str, int], int] | None,
    change: Callable[[dict[str, Array], int], dict[str, Array]] = lambda grads, step: grads,
    method: type[reference.Shampoo] = reference.Shampoo,
) -> Iterates:
    """Weights of the reference after each step, with gradients passed through ``change``."""
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


def assert_follows(
    method: type[BlockOptimizer],
    dense: type[reference.Shampoo],
    shapes: Shapes,
    options: Mapping[str, Any],
) -> None:
    """Compare with ``dense`` to 1e-10, or 100 times its own response to changes of 1e-15."""
    mine, turns = library_iterates(method, shapes, options)
    own = ("basis_method", "degenerate_basis")  # of SOAP: ``dense`` has its own reference for each
    known = {"grafting": None} | {k: v for k, v in options.items() if k not in own}
    expected = reference_iterates(shapes, known, turns, method=dense)
    start = weights_of(shapes)
    errors = largest_errors(mine, expected, start)

    def response(seed: int) -> dict[str, float]:
        noisy = reference_iterates(
            shapes, known, turns, lambda g, step: disturbed(g, step, ROUNDING, seed), method=dense
        )
        return largest_errors(noisy, expected, start)

    assert_within_response(errors, response, TOLERANCE, MULTIPLE, SHARPNESS)
