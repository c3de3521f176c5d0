"""SOAP: Adam in the eigenbasis of Shampoo's factors (arXiv 2409.11321), the bases rotated exactly.

The first moment is kept outside the basis and the second inside it; when the basis changes, the
second moment is mixed by the squares of the rotation. Until step ``start`` the basis is the
identity; if ``start`` is 1, that step only makes the basis and does not count.

Among equal eigenvalues, those of a null space too, the eigenvectors are those of ``Q W Q^T``, with
``Q`` the old basis and ``W`` its weights, ``sqrt(1 / d), sqrt(2 / d), ...``. ``Published`` leaves
them to LAPACK.
"""

from typing import Literal

import numpy as np

from tests.reference import shampoo
from tests.reference.blocks import Array, contract_all

EQUAL = np.finfo(np.float64).eps ** 0.75
"""Eigenvalues that are no further apart, relative to the largest, count as equal."""
UNKNOWN = 1e-12
"""Entries in the basis whose mean square is below its square, relative to the sum of all."""


def clusters(values: Array) -> list[list[int]]:
    """Positions of equal eigenvalues among ``values`` in ascending order.

    Neighbours that are equal are chained; chains are cut where they are longer than that.
    """
    width = EQUAL * np.abs(values).max()
    found: list[list[int]] = []
    start, piece = 0.0, 0
    for k, value in enumerate(values):
        if k == 0 or value - values[k - 1] > width:
            start, piece = value, 0
            found.append([k])
        elif width > 0 and (value - start) // width != piece:
            piece = (value - start) // width
            found.append([k])
        else:
            found[-1].append(k)
    return found


def eigenvectors(factor: Array, old: Array) -> Array:
    """Those that stay next to ``old``."""
    values, vectors = np.linalg.eigh(factor)
    d = len(values)
    weighted = old @ np.diag(np.sqrt(np.arange(1, d + 1) / d)) @ old.T
    parts = [vectors[:, some] for some in clusters(values)]
    return np.hstack([v @ np.linalg.eigh(v.T @ weighted @ v)[1] for v in parts])


def iterated(factor: Array, old: Array) -> Array:
    """One orthogonal iteration, the largest Rayleigh quotients first; equal ones as they are.

    A hundredth of its length along the old vector is added to each column, and a millionth of the
    longest column at least.
    """
    columns = factor @ old
    longest = max(np.linalg.norm(column) for column in columns.T)
    quotients = np.array([vector @ factor @ vector for vector in old.T])
    order = sorted(range(len(old)), key=lambda k: -round(quotients[k] / quotients.max() * 2**20))
    shifted = [
        columns[:, k] + max(0.01 * np.linalg.norm(columns[:, k]), 1e-6 * longest) * old[:, k]
        for k in order
    ]
    return np.linalg.qr(np.stack(shifted, axis=1))[0]


class Block(shampoo.Block):
    """A block of Shampoo whose ``roots`` give way to ``bases``, columns being eigenvectors."""

    method: Literal["eigh", "qr"] = "eigh"
    is_published = False

    def __init__(self, weight: Array, options: shampoo.Options, turn: int) -> None:
        super().__init__(weight, options, turn)
        self.bases = [np.eye(d) for d in weight.shape]

    def new_basis(self, dim: int, step: int) -> Array:
        """All eigenvectors in step ``start`` and for "eigh", else one orthogonal iteration."""
        factor, old = self.factors[dim], self.bases[dim]
        is_first = step == self.start or self.method == "eigh"
        if not self.is_published:
            return eigenvectors(factor, old) if is_first else iterated(factor, old)
        if is_first:
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
        direction = mean / scale
        if not self.is_published:
            direction[self.second_moment <= UNKNOWN**2 * self.second_moment.sum()] = 0
        return contract_all(direction, self.bases)

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


class PublishedBlock(Block):
    """Bases as LAPACK returns them."""

    is_published = True


class PublishedBlockByQR(BlockByQR):
    """The same by one QR step."""

    is_published = True


class SOAP(shampoo.Shampoo):
    """Use with ``start_step=1`` and an ``eps`` for Adam's denominator, such as 1e-8."""

    block_type = Block


class SOAPByQR(shampoo.Shampoo):
    """The same with one QR step at each refresh after the first."""

    block_type = BlockByQR


class PublishedSOAP(shampoo.Shampoo):
    """Among equal eigenvalues, rounding decides."""

    block_type = PublishedBlock


class PublishedSOAPByQR(shampoo.Shampoo):
    """The same with one QR step at each refresh after the first."""

    block_type = PublishedBlockByQR
