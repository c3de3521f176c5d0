"""Blocked Shampoo (Shi et al. 2023), one Python loop over blocks and one over dims, in float64.

Numbered comments are the lines of the update rule. ``step`` is the parameter's own count of
steps in which it had a gradient; it starts at 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from tests.reference.blocks import Array, BlockSize, blocks_of, contract, unfold


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the update rule may be told; names and defaults are those of the rule."""

    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float | None = None
    eps: float = 1e-12
    eps_relative: float | None = None
    bias_correction: bool = True
    block_size: BlockSize = 1024
    merge: str = "matrix"
    batch_dims: int = 0
    precondition_frequency: int = 10
    start_step: int | None = None
    grafting: str = "none"
    grafting_beta2: float = 0.999
    grafting_eps: float = 1e-8
    exponent: float | tuple[float, ...] | None = None
    root_method: str = "eigh"
    factor_frequency: int = 1
    match_rms: float | None = None
    weight_decay: float = 0.0
    weight_decay_type: str = "decoupled"
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    @property
    def first_moment_beta(self) -> float:
        """beta3, which is beta1 unless it is set."""
        return self.betas[0] if self.beta3 is None else self.beta3

    @property
    def start(self) -> int:
        """The step of the first refresh, one period after the beginning unless it is set."""
        return self.precondition_frequency if self.start_step is None else self.start_step

    def power(self, order: int, dim: int) -> float:
        """The positive number p of ``L^-p`` on one dim of a block with ``order`` dims."""
        if self.exponent is None:
            return 1 / (2 * order)
        return self.exponent[dim] if isinstance(self.exponent, tuple) else self.exponent


def root_by_eigh(factor: Array, power: float, eps: float) -> Array:
    """``(factor + eps I)^-power`` with every eigenvalue raised where the least is below eps."""
    values, vectors = np.linalg.eigh(factor + eps * np.eye(len(factor)))
    if values.min() < eps:
        values = values + (eps - values.min())
    return vectors @ np.diag(values**-power) @ vectors.T


def root_by_newton(factor: Array, power: float, eps: float, tolerance: float = 1e-6) -> Array:
    """``(factor + eps I)^-power`` by the coupled Newton iteration; ``1/power`` is an integer."""
    p = round(1 / power)
    identity = np.eye(len(factor))
    matrix = factor + eps * identity
    z = (p + 1) / (2 * np.linalg.norm(matrix))
    root, residual = z ** (1 / p) * identity, z * matrix
    for _ in range(1000):
        if np.abs(residual - identity).max() < tolerance:
            return root
        step = (1 + 1 / p) * identity - residual / p
        root = root @ step
        residual = np.linalg.matrix_power(step, p) @ residual
    raise ArithmeticError("the Newton iteration of the reference did not converge")


def decayed_direction(
    direction: Array, weight: Array, options: Options, lr: float, peak_lr: float
) -> Array:
    """Line 8: the direction with every kind of decay that is not "l2" added."""
    strength = {
        "l2": 0.0,
        "decoupled": options.weight_decay,
        "corrected": options.weight_decay * lr / peak_lr,
        "independent": options.weight_decay / peak_lr,
    }[options.weight_decay_type]
    return direction + strength * weight


def coupled_gradient(grad: Array, weight: Array, options: Options) -> Array:
    """Line 1: a new array, the gradient with "l2" decay added."""
    return grad + (options.weight_decay if options.weight_decay_type == "l2" else 0.0) * weight


def heavy_ball(direction: Array, buffer: Array, options: Options) -> tuple[Array, Array]:
    """Line 9: the direction and the new buffer."""
    mu, fresh = options.momentum, (1 - options.dampening) * direction
    buffer = mu * buffer + fresh
    return (fresh + mu * buffer if options.nesterov else buffer), buffer


class Block:
    """State of one block; ``turn`` delays its first refresh (0 when all refresh together)."""

    def __init__(self, weight: Array, options: Options, turn: int) -> None:
        self.options = options
        self.start, self.turn = options.start + turn, turn
        self.num_measured = 0
        self.factors = [np.zeros((d, d)) for d in weight.shape]
        self.roots = [np.eye(d) for d in weight.shape]
        self.first_moment = np.zeros_like(weight)
        self.second_moment = np.zeros_like(weight)
        self.momentum = np.zeros_like(weight)

    def is_due(self, step: int, *, staggered: bool) -> bool:
        """Whether the roots are computed anew in this step."""
        frequency = self.options.precondition_frequency
        if staggered:
            return step >= self.start and (step - self.start) % frequency == 0
        return (step % frequency == 0 and step > self.start) or step == self.start

    def is_measured(self, step: int) -> bool:
        """Whether the factors take the gradient of this step."""
        frequency = self.options.factor_frequency
        return step == 1 or (step - 1 - self.turn) % frequency == 0

    def accumulate(self, grad: Array) -> None:
        """Line 2."""
        self.num_measured += 1
        beta2 = self.options.betas[1]
        new = 1.0 if beta2 == 1 else 1 - beta2
        for dim in range(grad.ndim):
            rows = unfold(grad, dim)
            self.factors[dim] = beta2 * self.factors[dim] + new * (rows @ rows.T)

    def refresh(self) -> None:
        """Line 3."""
        options = self.options
        beta2, order = options.betas[1], len(self.factors)
        corrected = options.bias_correction and beta2 < 1
        for dim, factor in enumerate(self.factors):
            power = options.power(order, dim)
            factor = factor / (1 - beta2**self.num_measured if corrected else 1.0)
            eps = options.eps
            if options.eps_relative is not None:
                eps = options.eps_relative * np.linalg.eigvalsh(factor)[-1]
            if power == 0:
                self.roots[dim] = np.eye(len(factor))
            elif options.root_method == "newton":
                self.roots[dim] = root_by_newton(factor, power, eps)
            else:
                self.roots[dim] = root_by_eigh(factor, power, eps)

    def accumulate_grafting(self, grad: Array) -> None:
        """Line 4."""
        beta2 = self.options.grafting_beta2
        old, new = (1.0, 1.0) if self.options.grafting == "adagrad" else (beta2, 1 - beta2)
        self.second_moment = old * self.second_moment + new * grad**2

    def filtered(self, grad: Array, step: int) -> Array:
        """Line 5."""
        beta1, beta3 = self.options.betas[0], self.options.first_moment_beta
        if beta1 == 0:
            return grad
        mean = beta3 * self.first_moment + (1 - beta3) * grad
        self.first_moment = beta1 * self.first_moment + (1 - beta1) * grad
        return mean / (1 - beta3 * beta1 ** (step - 1) if self.options.bias_correction else 1.0)

    def graft(self, mean: Array, step: int) -> Array:
        """Line 6."""
        options = self.options
        if options.grafting in ("none", "sgd"):
            return mean
        second = self.second_moment
        if options.grafting == "adam":
            second = second / (1 - options.grafting_beta2**step)
        return mean / (np.sqrt(second) + options.grafting_eps)

    def precondition(self, mean: Array, step: int) -> Array:
        """Line 7."""
        grafted = self.graft(mean, step)
        if step < self.start:
            return grafted
        direction = mean
        for dim, root in enumerate(self.roots):
            direction = contract(direction, root, dim)
        if self.options.grafting == "none":
            return direction
        return direction * (np.linalg.norm(grafted) / (np.linalg.norm(direction) + 1e-16))

    def direction(self, grad: Array, step: int, *, staggered: bool) -> Array:
        """Lines 2 to 7."""
        if self.is_measured(step):
            self.accumulate(grad)
        if self.is_due(step, staggered=staggered):
            self.refresh()
        self.accumulate_grafting(grad)
        direction = self.precondition(self.filtered(grad, step), step)
        rms = self.options.match_rms
        return direction if rms is None else direction * (rms / np.sqrt(np.mean(direction**2)))

    def step(
        self, weight: Array, grad: Array, step: int, lr: float, peak_lr: float, staggered: bool
    ) -> None:
        """All lines, on the view ``weight`` of the parameter."""
        options = self.options
        direction = self.direction(
            coupled_gradient(grad, weight, options), step, staggered=staggered
        )
        direction = decayed_direction(direction, weight, options, lr, peak_lr)
        if options.momentum > 0:
            direction, self.momentum = heavy_ball(direction, self.momentum, options)
        weight -= lr * direction


class Shampoo:
    """Copies of the weights and the state of all their blocks.

    Args:
        weights: Name -> initial value; kept as float64 copies in ``weights``.
        options: The same for all weights, but for ``batch_dims`` where that is given.
        peak_lr: The initial learning rate, for two of the kinds of decay.
        turns: (name, block number) -> delay of its first refresh, "staggered"; None: "together".
        batch_dims: Name -> its number of leading dims that make separate grids.
    """

    block_type: type[Block] = Block

    def __init__(
        self,
        weights: Mapping[str, Array],
        options: Options,
        *,
        peak_lr: float,
        turns: Mapping[tuple[str, int], int] | None = None,
        batch_dims: Mapping[str, int] | None = None,
    ) -> None:
        self.weights = {name: np.array(w, np.float64, order="C") for name, w in weights.items()}
        self.peak_lr = peak_lr
        self.staggered = turns is not None
        self.steps = dict.fromkeys(weights, 0)
        self.options = {
            name: replace(options, batch_dims=(batch_dims or {}).get(name, options.batch_dims))
            for name in weights
        }
        self.blocks = {
            name: [
                self.block_type(
                    view, self.options[name], 0 if turns is None else turns[name, index]
                )
                for index, view in enumerate(self.views(name, weight))
            ]
            for name, weight in self.weights.items()
        }

    def views(self, name: str, array: Array) -> list[Array]:
        """The blocks of an array of the shape of the weight ``name``, as views."""
        o = self.options[name]
        return list(
            blocks_of(array, merge=o.merge, block_size=o.block_size, batch_dims=o.batch_dims)
        )

    def step(self, grads: Mapping[str, Array | None], lr: float) -> None:
        """One step; a weight without a gradient keeps everything, its count too."""
        for name, weight in self.weights.items():
            grad = grads.get(name)
            if grad is None:
                continue
            self.steps[name] += 1
            grad = np.array(grad, np.float64, order="C")
            views = zip(
                self.views(name, weight), self.views(name, grad), self.blocks[name], strict=True
            )
            for part, part_grad, block in views:
                block.step(part, part_grad, self.steps[name], lr, self.peak_lr, self.staggered)
