"""Roots, bases and moments in bfloat16 cost little accuracy and save the memory they promise."""

from typing import Any

import pytest
import torch

from titan_shampoo import SOAP, KLShampoo, Shampoo

METHODS: dict[str, Any] = {"Shampoo": Shampoo, "SOAP": SOAP, "KLShampoo": KLShampoo}
REDUCED: dict[str, tuple[str, dict[str, torch.dtype]]] = {
    "roots": ("Shampoo", {"root_dtype": torch.bfloat16}),
    "roots of KL-Shampoo": ("KLShampoo", {"root_dtype": torch.bfloat16}),
    "bases": ("SOAP", {"basis_dtype": torch.bfloat16}),
    "moments": ("Shampoo", {"state_dtype": torch.bfloat16}),
    "moments in the basis": ("SOAP", {"state_dtype": torch.bfloat16}),
}


def excess_loss(method: str, **options: Any) -> tuple[float, torch.Tensor]:
    """Noisy, ill-conditioned least squares: excess loss after 300 steps, and the last weights."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-2, 0, 24)
    target = torch.randn(16, 24, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(16, 24))
    optimizer = METHODS[method]([("w", weight)], lr=0.05, block_size=16, **options)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        inputs = scales * torch.randn(64, 24, generator=generator)
        noise = 0.01 * torch.randn(64, 16, generator=generator)
        optimizer.zero_grad()
        residual = inputs @ weight.T - inputs @ target.T - noise
        residual.square().mean().backward()
        optimizer.step()
    error = (weight.detach() - target) * scales
    return float(error.square().sum(1).mean()), weight.detach()


@pytest.mark.parametrize("case", REDUCED)
def test_reduced_precision_trains_as_well(case: str) -> None:
    method, dtypes = REDUCED[case]
    exact, weight = excess_loss(method)
    reduced, other = excess_loss(method, **dtypes)
    assert not torch.equal(weight, other), "the option does nothing"
    assert reduced < 1.2 * exact
    start = float((torch.logspace(-2, 0, 24)).square().sum())
    assert exact < 1e-2 * start


@pytest.mark.parametrize("case", REDUCED)
def test_state_has_the_dtype_that_was_asked_for(case: str) -> None:
    method, dtypes = REDUCED[case]
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = METHODS[method]([("w", weight)], **dtypes)
    kinds = {"root_dtype": "_root", "basis_dtype": "_basis", "state_dtype": "exp_avg"}
    (option,) = dtypes
    for key, value in optimizer.state[weight].items():
        if "." in key:
            wanted = torch.bfloat16 if kinds[option] in key else torch.float32
            assert value.dtype == wanted, key
