"""KL-Shampoo gives the iterates of its naive dense float64 reference."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.reference.kl_shampoo import KLShampoo as Reference
from tests.support.block_iterates import SHAPES, STACKS, assert_follows
from titan_shampoo import KLShampoo

BASE: dict[str, Any] = {
    "betas": (0.9, 0.95),
    "block_size": 5,
    "precondition_frequency": 3,
    "start_step": 1,
    "refresh": "staggered",
    "grafting": None,
}
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "together": {"refresh": "together"},
    "from step 5": {"start_step": 5},
    "from step 5, together": {"start_step": 5, "refresh": "together"},
    "after one period": {"start_step": None},
    "in every step": {"precondition_frequency": 1},
    "never": {"precondition_frequency": 100, "start_step": 100},
    "whole matrices": {"block_size": 1024},
    "blocks that divide": {"block_size": 3},
    "blocks of one element": {"block_size": 1},
    "pair": {"block_size": (4, 7)},
    "paper, cut": {"merge": "paper", "block_size": 12},
    "not merged": {"merge": "none"},
    "not merged, pair": {"merge": "none", "block_size": (4, 2)},
    "no filtered gradient": {"betas": (0.0, 0.95)},
    "summed factors": {"betas": (0.9, 1.0)},
    "short memory: eigenvalues at the floor": {"betas": (0.9, 0.3)},
    "beta3": {"beta3": 0.5},
    "no bias correction": {"bias_correction": False, "grafting": "adam"},
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
    f"decay {kind}": {
        "weight_decay": 0.3,
        "weight_decay_type": kind,
        "grafting": "adam",
        "momentum": 0.5,
    }
    for kind in ("l2", "decoupled", "corrected", "independent")
}
CASES |= {
    "factors every 2nd step": {"factor_frequency": 2, "precondition_frequency": 4},
    "matched length": {"match_rms": 0.2},
    "momentum": {"momentum": 0.7},
    "dampening": {"momentum": 0.7, "dampening": 0.4},
    "nesterov": {"momentum": 0.7, "nesterov": True},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if "one element" in c else c for c in CASES]
)
def test_iterates_equal_the_reference(case: str) -> None:
    assert_follows(KLShampoo, Reference, SHAPES, BASE | CASES[case])


@pytest.mark.parametrize("options", [{}, {"block_size": 3, "grafting": "adam"}])
def test_stacks_of_experts_are_cut_slice_by_slice(options: dict[str, Any]) -> None:
    assert_follows(KLShampoo, Reference, STACKS, BASE | {"batch_dims": 1} | options)


@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_the_size_of_gradients_does_not_matter(size: float) -> None:
    torch.manual_seed(0)
    grads = [torch.randn(6, 9, dtype=torch.float64) for _ in range(12)]
    ends = []
    for factor in (1.0, size):
        weight = torch.nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
        optimizer = KLShampoo([("w", weight)], lr=0.1, **BASE | {"refresh": "together"})
        for grad in grads:
            weight.grad = factor * grad
            optimizer.step()
        ends.append(weight.detach())
    assert torch.allclose(ends[0], ends[1], rtol=1e-10)
    assert ends[0].abs().mean() > 0.1
