"""FOOF and K-FAC as the papers define them: dense Kronecker products, solved; NumPy only."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.reference.eva import Array, Seen, _solve


def foof(grad: Array, a: Array, damping: float) -> Array:
    """``solve(kron(I, A) + y I, vec G)``."""
    return _solve(np.kron(np.eye(len(grad)), a), grad, damping)


def kfac_exact(grad: Array, a: Array, b: Array, damping: float) -> Array:
    """``solve(kron(B, A) + y I, vec G)``."""
    return _solve(np.kron(b, a), grad, damping)


def kfac_factored(grad: Array, a: Array, b: Array, damping: float) -> Array:
    """``solve(kron(B + sqrt(y) / pi I, A + sqrt(y) pi I), vec G)``; pi is 1 where a trace is 0."""
    pi, root = _ratio(a, b), damping**0.5
    left, right = b + root / pi * np.eye(len(b)), a + root * pi * np.eye(len(a))
    solved = np.linalg.solve(np.kron(left, right), grad.ravel())
    solution: Array = np.asarray(solved, dtype=np.float64)
    return solution.reshape(grad.shape)


def _ratio(a: Array, b: Array) -> float:
    traces = np.trace(a) / len(a), np.trace(b) / len(b)
    return float((traces[0] / traces[1]) ** 0.5) if min(traces) > 0 else 1.0


class NaiveKFAC:
    """The whole optimizer, for layers only, with heavy ball and decoupled decay.

    Args:
        method: ``"FOOF"`` or ``"KFAC"``.
        params: ``name -> (weight, bias or None)``; changed in place.
        options: As the library's.
        turns: Step of the period in which each block is refreshed, by name, row-major.
        moment_turns: Step of ``factor_frequency`` in which a layer's moments are formed, by name,
            beside the first.
    """

    def __init__(
        self,
        method: str,
        params: Mapping[str, tuple[Array, Array | None]],
        options: Mapping[str, Any],
        turns: Mapping[str, list[int]],
        moment_turns: Mapping[str, int],
    ) -> None:
        self.turns, self.moment_turns = turns, moment_turns
        self.method, self.params, self.options = method, params, options
        self.factors: dict[str, tuple[Array, Array]] = {}
        self.used: dict[tuple[str, int], tuple[Array, Array]] = {}
        self.buffers: dict[tuple[str, int], Array] = {}
        self.time = 0

    def step(self, seen: Mapping[str, Seen], lr: float) -> None:
        options = self.options
        found = {}
        for name, layer in seen.items():
            turn = self.moment_turns[name]
            if self.time == 0 or self.time % options["factor_frequency"] == turn:
                self._average(name, layer)
            matrix = layer.weight_grad.reshape(len(layer.weight_grad), -1)
            if layer.bias_grad is not None:
                matrix = np.concatenate([matrix, layer.bias_grad[:, None]], axis=1)
            found[name] = matrix, self._precondition(name, matrix)
        self.time += 1
        scale = self._scale(list(found.values()), lr)
        for name, (_, direction) in found.items():
            self._move(name, scale * direction, lr)

    def _average(self, name: str, layer: Seen) -> None:
        rows = len(layer.inputs)
        inputs = layer.inputs
        if layer.bias_grad is not None:
            inputs = np.concatenate([inputs, np.ones((rows, 1))], axis=1)
        count = self.options["loss_normaliser"] or rows
        new = (
            inputs.T @ inputs / rows,
            count * layer.output_grads.T @ layer.output_grads,
        )
        xi = self.options["statistics_decay"]
        if name in self.factors:
            old = self.factors[name]
            new = (xi * old[0] + (1 - xi) * new[0], xi * old[1] + (1 - xi) * new[1])
        self.factors[name] = new

    def _precondition(self, name: str, grad: Array) -> Array:
        """Block by block."""
        a, b = self.factors[name]
        size = self.options["max_factor_dim"] or max(grad.shape)
        result = np.zeros_like(grad)
        turns = iter(self.turns[name])
        for number, (row, column) in enumerate(
            (row, column)
            for row in range(0, grad.shape[0], size)
            for column in range(0, grad.shape[1], size)
        ):
            rows, columns = slice(row, row + size), slice(column, column + size)
            if self.time % self.options["precondition_frequency"] == next(turns):
                self.used[name, number] = a[columns, columns], b[rows, rows]
            used = self.used.get((name, number))
            block = grad[rows, columns]
            if used is None:  # waits for its turn: at most as long as by the inverse
                result[rows, columns] = self._bounded(block, a[columns, columns], b[rows, rows])
            else:
                result[rows, columns] = self._solve(block, *used)
        return result

    def _bounded(self, grad: Array, a: Array, b: Array) -> Array:
        """By traces times the identity in place of the factors."""
        damping = self._damping(a, b)
        if self.method == "FOOF":
            return grad / (np.trace(a) + damping)
        if self.options["factored_damping"] is False:
            return grad / (np.trace(a) * np.trace(b) + damping)
        pi, root = _ratio(a, b), damping**0.5
        return grad / ((np.trace(a) + root * pi) * (np.trace(b) + root / pi))

    def _damping(self, a: Array, b: Array) -> float:
        damping = float(self.options["damping"])
        if self.options["damping_mode"] == "relative":
            damping *= np.trace(a) / len(a)
            damping *= 1.0 if self.method == "FOOF" else np.trace(b) / len(b)
        return damping

    def _solve(self, grad: Array, a: Array, b: Array) -> Array:
        damping = self._damping(a, b)
        if self.method == "FOOF":
            return foof(grad, a, damping)
        exact = self.options["factored_damping"] is False
        return (kfac_exact if exact else kfac_factored)(grad, a, b, damping)

    def _scale(self, found: list[tuple[Array, Array]], lr: float) -> float:
        inner = sum(float((g * p).sum()) for g, p in found)
        if self.options["scaling"] == "kl_clip":
            return min(1.0, (self.options["kl_clip"] / (lr**2 * inner)) ** 0.5)
        if self.options["scaling"] == "norm":
            squares = [sum(float((t[k] ** 2).sum()) for t in found) for k in (0, 1)]
            return (squares[0] / squares[1]) ** 0.5
        return 1.0

    def _move(self, name: str, direction: Array, lr: float) -> None:
        weight, bias = self.params[name]
        columns = weight[0].size
        parts = [(weight, direction[:, :columns].reshape(weight.shape))]
        if bias is not None:
            parts.append((bias, direction[:, -1]))
        for index, (param, step) in enumerate(parts):
            old = self.buffers.get((name, index), np.zeros_like(param))
            step = step + self.options["weight_decay"] * param
            self.buffers[name, index] = self.options["momentum"] * old + step
            param -= lr * self.buffers[name, index]
