"""Shampoo gives the iterates of its naive dense float64 reference, for every option.

Rank-deficient factors amplify rounding, so a case may differ by a multiple of what the reference
itself makes of gradients (and, in float32, of factors) changed by rounding; a case for which that
is no sharp test fails as well.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference import shampoo as reference
from tests.reference.blocks import Array
from tests.support.block_iterates import (
    SHAPES,
    STACKS,
    assert_within_response,
    disturbed,
    largest_errors,
    library_iterates,
    reference_iterates,
    weights_of,
)
from titan_shampoo import Shampoo
from titan_shampoo.functional.roots import inverse_root

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
    mine, turns = library_iterates(
        Shampoo, shapes, {**options, "factor_dtype": factor_dtype}, dtype
    )
    expected = reference_iterates(shapes, options, turns)
    start = weights_of(shapes)
    errors = largest_errors(mine, expected, start)

    def response(seed: int) -> dict[str, float]:
        noisy = reference_iterates(
            shapes, options, turns, lambda g, step: disturbed(g, step, rounding, seed), method
        )
        return largest_errors(noisy, expected, start)

    assert_within_response(errors, response, tolerance, multiple, sharpness)


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
