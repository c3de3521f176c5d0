"""SOAP beside its published code: the same iterates, but for three changes that are ours."""

import pytest
import torch
from torch import Tensor

from titan_shampoo import SOAP
from titan_shampoo.functional.roots import Degenerate

LR, BETAS, EPS, PERIOD, STEPS = 3e-3, (0.95, 0.95), 1e-8, 10, 60


def start(size: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, size, generator=generator, dtype=torch.float64), generator


def grad_of(weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(weight.shape, generator=generator, dtype=torch.float64) + weight


def next_bases(factors: list[Tensor], bases: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """``get_orthogonal_matrix_QR``: one iteration from the old columns, by falling quotients."""
    orders = [
        (basis * (factor @ basis)).sum(0).argsort(descending=True)
        for factor, basis in zip(factors, bases, strict=True)
    ]
    pairs = zip(factors, bases, orders, strict=True)
    return [torch.linalg.qr(factor @ basis[:, order])[0] for factor, basis, order in pairs], orders


class Published:
    """github.com/nikhilvyas/SOAP, for one square matrix.

    Args:
        size: Of the matrix.
        turns_first: Whether bases turn before a step instead of behind it.
        by_squares: Whether second moments turn with the bases instead of being reordered.
    """

    def __init__(self, size: int, *, turns_first: bool, by_squares: bool) -> None:
        self.weight, self.generator = start(size)
        self.turns_first, self.by_squares = turns_first, by_squares
        self.factors = [torch.zeros_like(self.weight), torch.zeros_like(self.weight)]
        self.mean, self.squares = torch.zeros_like(self.weight), torch.zeros_like(self.weight)

    def run(self) -> Tensor:
        """Weights after all steps; the first one only finds the bases."""
        self.accumulate(grad_of(self.weight, self.generator))
        self.bases = [torch.linalg.eigh(factor)[1] for factor in self.factors]
        for step in range(1, STEPS):
            grad = grad_of(self.weight, self.generator)
            if self.turns_first:
                self.update_preconditioner(grad, step)
            self.move(grad, step)
            if not self.turns_first:
                self.update_preconditioner(grad, step)
        return self.weight

    def move(self, grad: Tensor, step: int) -> None:
        left, right = self.bases
        rotated = left.T @ grad @ right
        self.mean = self.mean.lerp(rotated, 1 - BETAS[0])
        self.squares = self.squares.lerp(rotated.square(), 1 - BETAS[1])
        denominator = (self.squares / (1 - BETAS[1] ** step)).sqrt() + EPS
        inside = self.mean / (1 - BETAS[0] ** step) / denominator
        self.weight = self.weight - LR * left @ inside @ right.T

    def accumulate(self, grad: Tensor) -> None:
        for factor, product in zip(self.factors, (grad @ grad.T, grad.T @ grad), strict=True):
            factor.lerp_(product, 1 - BETAS[1])

    def update_preconditioner(self, grad: Tensor, step: int) -> None:
        self.accumulate(grad)
        if (step + 1) % PERIOD:
            return
        new, (rows, columns) = next_bases(self.factors, self.bases)
        left, right = (one.T @ old for one, old in zip(new, self.bases, strict=True))
        self.mean = left @ self.mean @ right.T
        if self.by_squares:
            self.squares = left.square() @ self.squares @ right.square().T
        else:
            self.squares = self.squares[rows][:, columns]
        self.bases = new


def ours(size: int, degenerate_basis: Degenerate = "arbitrary") -> Tensor:
    weight, generator = start(size)
    param = torch.nn.Parameter(weight.clone())
    optimizer = SOAP([("w", param)], lr=LR, betas=BETAS, eps=EPS, precondition_frequency=PERIOD,
                     refresh="together", start_step=1,
                     degenerate_basis=degenerate_basis)  # fmt: skip
    for _ in range(STEPS):
        param.grad = grad_of(param.detach(), generator)
        optimizer.step()
    return param.detach()


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to how far the weights moved."""
    return float((one - other).abs().max() / (one - start(len(one))[0]).abs().max())


def test_without_the_third_change_and_with_the_other_two_published_iterates_are_ours() -> None:
    """Bases that turn before the step, and second moments that turn by squares."""
    assert distance(ours(8), Published(8, turns_first=True, by_squares=True).run()) < 1e-13


def test_that_the_basis_before_decides_among_equal_eigenvalues_counts() -> None:
    other = Published(8, turns_first=True, by_squares=True).run()
    assert 1e-4 < distance(ours(8, "previous"), other) < 1e-2


CHANGES = [(False, False), (False, True), (True, False)]


@pytest.mark.parametrize(("turns_first", "by_squares"), CHANGES)
def test_each_of_the_first_two_changes_counts(turns_first: bool, by_squares: bool) -> None:
    other = Published(8, turns_first=turns_first, by_squares=by_squares).run()
    assert 1e-3 < distance(ours(8), other) < 0.2
