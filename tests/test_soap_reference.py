"""SOAP gives the iterates of its naive dense float64 reference.

In the null space of a factor any basis is an eigenbasis, and Adam's steps depend on which it is.
So the published form, where rounding decides, is compared where factors have full rank from their
first refresh on: from step 1 for blocks that are squares, after as many steps as they have entries
for vectors. Ours, where the previous basis decides, is compared for all shapes from step 1 on.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.reference import shampoo, soap
from tests.support.block_iterates import SHAPES, STACKS, assert_follows
from titan_shampoo import SOAP

REFERENCES: dict[str, type[shampoo.Shampoo]] = {"eigh": soap.SOAP, "qr": soap.SOAPByQR}
PUBLISHED: dict[str, type[shampoo.Shampoo]] = {
    "eigh": soap.PublishedSOAP,
    "qr": soap.PublishedSOAPByQR,
}
SQUARES: dict[str, tuple[int, ...]] = {"small": (12, 9), "tall": (9, 6), "conv": (3, 3, 3, 1)}

BASE: dict[str, Any] = {
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "precondition_frequency": 3,
    "refresh": "staggered",
}
EARLY: dict[str, dict[str, Any]] = {
    "from step 1": {"start_step": 1},
    "from step 1, together": {"start_step": 1, "refresh": "together"},
    "from step 1, in every step": {"start_step": 1, "precondition_frequency": 1},
    "from step 1, never again": {"start_step": 1, "precondition_frequency": 30},
    "from step 2": {"start_step": 2},
    "from step 5, together": {"start_step": 5, "refresh": "together"},
    "after one period": {"start_step": None},
    "blocks of one element": {"block_size": 1, "start_step": 1},
    "no first moment": {"start_step": 1, "betas": (0.0, 0.95)},
    "nesterov": {"start_step": 1, "momentum": 0.7, "nesterov": True},
}
EARLY |= {
    f"decay {kind}, {refresh}": {
        "start_step": 1,
        "weight_decay": 0.3,
        "weight_decay_type": kind,
        "refresh": refresh,
        "momentum": momentum,
    }
    for kind in ("l2", "decoupled", "corrected", "independent")
    for refresh, momentum in (("staggered", 0.0), ("together", 0.5))
}
LATE: dict[str, dict[str, Any]] = {
    "base": {},
    "strong damping": {"eps": 1e-2},
    "together": {"refresh": "together"},
    "never: Adam": {"start_step": 100},
    "in every step": {"precondition_frequency": 1},
    "whole matrices": {"block_size": 1024},
    "pair": {"block_size": (4, 7)},
    "paper, cut": {"merge": "paper", "block_size": 12},
    "not merged": {"merge": "none"},
    "not merged, pair": {"merge": "none", "block_size": (4, 2)},
    "factors every 2nd step": {"factor_frequency": 2},
    "momentum": {"momentum": 0.7},
    "dampening": {"momentum": 0.7, "dampening": 0.4},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("basis_method", PUBLISHED)
@pytest.mark.parametrize("case", EARLY)
def test_published_iterates_of_squares_equal_the_reference(case: str, basis_method: str) -> None:
    options = BASE | {"block_size": 3, "basis_method": basis_method} | EARLY[case]
    options["degenerate_basis"] = "arbitrary"
    assert_follows(SOAP, PUBLISHED[basis_method], SQUARES, options)


@pytest.mark.parametrize("basis_method", PUBLISHED)
@pytest.mark.parametrize("case", LATE)
def test_published_iterates_equal_the_reference(case: str, basis_method: str) -> None:
    options = BASE | {"block_size": 5, "start_step": 9, "basis_method": basis_method} | LATE[case]
    options["degenerate_basis"] = "arbitrary"
    assert_follows(SOAP, PUBLISHED[basis_method], SHAPES, options)


@pytest.mark.parametrize("basis_method", REFERENCES)
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if "one element" in c else c for c in EARLY]
)
def test_iterates_equal_the_reference_from_rank_one_on(case: str, basis_method: str) -> None:
    options = BASE | {"block_size": 5, "basis_method": basis_method} | EARLY[case]
    assert_follows(SOAP, REFERENCES[basis_method], SHAPES, options)


@pytest.mark.parametrize("basis_method", REFERENCES)
@pytest.mark.parametrize("case", LATE)
def test_iterates_equal_the_reference(case: str, basis_method: str) -> None:
    options = BASE | {"block_size": 5, "start_step": 2, "basis_method": basis_method} | LATE[case]
    assert_follows(SOAP, REFERENCES[basis_method], SHAPES, options)


@pytest.mark.parametrize("basis_method", REFERENCES)
def test_stacks_of_experts_are_cut_slice_by_slice(basis_method: str) -> None:
    options = BASE | {"batch_dims": 1, "block_size": 4, "start_step": 1}
    options["basis_method"] = basis_method
    assert_follows(SOAP, REFERENCES[basis_method], STACKS, options)
