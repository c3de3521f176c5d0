"""Twenty iterates of any optimizer beside those of its float64 reference.

Weights, gradients and tolerances are those of Shampoo's test.
"""

from collections.abc import Mapping
from typing import Any

import torch

from tests.reference import shampoo as reference
from tests.test_shampoo_reference import (
    LR,
    STEPS,
    Iterates,
    assert_within_response,
    disturbed,
    gradients,
    largest_errors,
    learning_rate,
    reference_iterates,
    weights_of,
)
from titan_shampoo.blocks.optimizer import BlockOptimizer

Shapes = Mapping[str, tuple[int, ...]]

ROUNDING, TOLERANCE, MULTIPLE, SHARPNESS = 1e-15, 1e-10, 100, 1e-6


def library_iterates(
    method: type[BlockOptimizer], shapes: Shapes, options: Mapping[str, Any]
) -> tuple[Iterates, dict[tuple[str, int], int]]:
    """Weights after each step in float64, and the turn of each block."""
    params = {
        name: torch.nn.Parameter(torch.from_numpy(w.copy()))
        for name, w in weights_of(shapes).items()
    }
    make: Any = method  # the subclasses take options, their base a dictionary of them
    optimizer: BlockOptimizer = make(params.items(), lr=LR, fallback=None, **options)
    iterates = []
    for step in range(1, STEPS + 1):
        grads = gradients(shapes, step)
        for name, param in params.items():
            param.grad = torch.from_numpy(grads[name]) if name in grads else None
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        iterates.append({n: p.detach().numpy().copy() for n, p in params.items()})
    engine = optimizer._engine
    assert engine is not None
    names = list(params)
    return iterates, {(names[b.param], b.index): b.slot for b in engine.plan.blocks}


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
