"""KL-Shampoo: every factor is built from the gradient preconditioned on all the other dims.

``L <- beta2 L + w2 G R^-1 G^T / i`` and ``R`` likewise, power 1/2 on each side, the inverses being
those of the last refresh. Both begin as multiples of I, equal ones whose product is the mean square
of the first gradient (1, if that is zero). All else is Shampoo with its first refresh in step 1.
"""

import math

import numpy as np

from tests.reference import shampoo
from tests.reference.blocks import Array, contract, unfold

FLOOR = 1e-6  # relative to the largest eigenvalue


class Block(shampoo.Block):
    """A block of Shampoo with other factors and other roots."""

    def __init__(self, weight: Array, options: shampoo.Options, turn: int) -> None:
        super().__init__(weight, options, turn)
        self.has_begun = False

    def begin(self, grad: Array) -> None:
        """Factors, and their inverse square roots, before the first gradient is seen."""
        square = float((grad**2).mean()) or 1.0
        scale = square ** (1 / grad.ndim)
        self.factors = [scale * np.eye(d) for d in grad.shape]
        self.roots = [np.eye(d) / scale**0.5 for d in grad.shape]
        self.has_begun = True

    def accumulate(self, grad: Array) -> None:
        """All factors from the same, stored roots: neither sees what the other becomes."""
        if not self.has_begun:
            self.begin(grad)
        beta2 = self.options.betas[1]
        new = 1.0 if beta2 == 1 else 1 - beta2
        for dim in range(grad.ndim):
            whitened = grad
            for other in range(grad.ndim):
                if other != dim:
                    inverse = self.roots[other] @ self.roots[other].T
                    whitened = contract(whitened, inverse, other)
            columns = math.prod(grad.shape) // grad.shape[dim]
            statistic = unfold(whitened, dim) @ unfold(grad, dim).T / columns
            self.factors[dim] = beta2 * self.factors[dim] + new * statistic

    def refresh(self) -> None:
        """Inverse square roots with the eigenvalues floored; no damping, no bias correction."""
        for dim, factor in enumerate(self.factors):
            values, vectors = np.linalg.eigh(factor)
            values = np.maximum(values, FLOOR * values.max())
            self.roots[dim] = vectors @ np.diag(values**-0.5) @ vectors.T


class KLShampoo(shampoo.Shampoo):
    """Use with ``start_step=1``: the rule refreshes first in step 1."""

    block_type = Block
