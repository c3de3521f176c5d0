"""SOAP: Adam in the eigenbasis of Shampoo's factors (arXiv 2409.11321), the bases rotated exactly.

The first moment is kept outside the basis and the second inside it; when the basis changes, the
second moment is mixed by the squares of the rotation. Until step ``start`` the basis is the
identity; if ``start`` is 1, that step only makes the basis and does not count.
"""

from typing import Literal

import numpy as np

from tests.reference import shampoo
from tests.reference.blocks import Array, contract_all


class Block(shampoo.Block):
    """A block of Shampoo whose ``roots`` give way to ``bases``, columns being eigenvectors."""

    method: Literal["eigh", "qr"] = "eigh"

    def __init__(self, weight: Array, options: shampoo.Options, turn: int) -> None:
        super().__init__(weight, options, turn)
        self.bases = [np.eye(d) for d in weight.shape]

    def new_basis(self, dim: int, step: int) -> Array:
        """All eigenvectors in step ``start`` and for "eigh", else one orthogonal iteration.

        It starts from the old basis in the order of its Rayleigh quotients, the largest first.
        """
        factor, old = self.factors[dim], self.bases[dim]
        if step == self.start or self.method == "eigh":
            return np.linalg.eigh(factor)[1]
        quotients = [column @ factor @ column for column in old.T]
        return np.linalg.qr(factor @ old[:, np.argsort(quotients)[::-1]])[0]

    def rebase(self, step: int) -> None:
        """Line 4."""
        new = [self.new_basis(dim, step) for dim in range(len(self.bases))]
        rotations = [q.T @ old for q, old in zip(new, self.bases, strict=True)]
        self.second_moment = contract_all(self.second_moment, rotations, lambda u: u * u)
        self.bases = new

    def adam(self, grad: Array, age: int) -> Array:
        """Lines 5 and 6; ``age`` counts the gradients in the moments, this one too."""
        beta2 = self.options.betas[1]
        inside = contract_all(grad, self.bases, np.transpose)
        self.second_moment = beta2 * self.second_moment + (1 - beta2) * inside**2
        mean = contract_all(self.filtered(grad, age), self.bases, np.transpose)
        scale = np.sqrt(self.second_moment / (1 - beta2**age)) + self.options.eps
        return contract_all(mean / scale, self.bases)

    def step(
        self, weight: Array, grad: Array, step: int, lr: float, peak_lr: float, staggered: bool
    ) -> None:
        """All lines, on the view ``weight`` of the parameter."""
        options = self.options
        grad = shampoo.coupled_gradient(grad, weight, options)
        if self.is_measured(step):
            self.accumulate(grad)
        if self.is_due(step, staggered=staggered):
            self.rebase(step)
        if step == self.start == 1:
            return
        direction = self.adam(grad, step - 1 if self.start == 1 else step)
        if step > 1 or options.start_step != 1:  # else some block of the parameter rests: no decay
            direction = shampoo.decayed_direction(direction, weight, options, lr, peak_lr)
        if options.momentum > 0:
            direction, self.momentum = shampoo.heavy_ball(direction, self.momentum, options)
        weight -= lr * direction


class BlockByQR(Block):
    """Later bases by one QR step from the basis before."""

    method = "qr"


class SOAP(shampoo.Shampoo):
    """Use with ``start_step=1`` and an ``eps`` for Adam's denominator, such as 1e-8."""

    block_type = Block


class SOAPByQR(shampoo.Shampoo):
    """The same with one QR step at each refresh after the first."""

    block_type = BlockByQR
