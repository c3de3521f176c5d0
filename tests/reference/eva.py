"""Eva, Eva-f and Eva-s as the papers define them: dense Kronecker products, solved; NumPy only."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def eva(grad: Array, a: Array, b: Array, damping: float) -> Array:
    """``solve(kron(b b^T, a a^T) + y I, vec G)``."""
    curvature = np.kron(np.outer(b, b), np.outer(a, a))
    return _solve(curvature, grad, damping)


def eva_f(grad: Array, a: Array, damping: float) -> Array:
    """``solve(kron(I, a a^T) + y I, vec G)``."""
    return _solve(np.kron(np.eye(grad.shape[0]), np.outer(a, a)), grad, damping)


def eva_s(grad: Array, damping: float) -> Array:
    """``solve(kron_j(v_j v_j^T) + y I, vec G)``, as long as G."""
    curvature: NDArray[Any] = np.ones((1, 1))
    for dim in range(grad.ndim):
        v = grad.mean(axis=tuple(other for other in range(grad.ndim) if other != dim))
        curvature = np.kron(curvature, np.outer(v, v))
    direction = _solve(curvature, grad, damping)
    length: float = float(np.linalg.norm(grad) / np.linalg.norm(direction))
    return direction * length


def _solve(curvature: NDArray[Any], grad: Array, damping: float) -> Array:
    damped = curvature + damping * np.eye(grad.size)
    solution: Array = np.asarray(np.linalg.solve(damped, grad.ravel()), dtype=np.float64)
    return solution.reshape(grad.shape)


class Seen(NamedTuple):
    """One layer in one step: gradients, and what went in and came back, row by row."""

    weight_grad: Array
    bias_grad: Array | None
    inputs: Array
    output_grads: Array


class NaiveEva:
    """The whole optimizer, for layers only; parameters are changed in place.

    Args:
        method: ``"Eva"``, ``"EvaF"`` or ``"EvaS"``.
        params: ``name -> (weight, bias or None)``.
        options: As the library's.
    """

    def __init__(
        self,
        method: str,
        params: Mapping[str, tuple[Array, Array | None]],
        options: Mapping[str, Any],
    ) -> None:
        self.method, self.params, self.options = method, params, options
        self.average: dict[str, tuple[Array, Array]] = {}
        self.eigenvalue: dict[str, float] = {}
        self.buffers: dict[tuple[str, int], Array] = {}

    def step(self, seen: Mapping[str, Seen], lr: float) -> None:
        found = {}
        for name, layer in seen.items():
            grads = self._decayed(name, layer)
            joint = self._joint(grads)
            damping = self._damping(name, layer, joint)
            found[name] = joint, self._direction(name, joint, damping), damping
        scale = self._scale(list(found.values()), lr)
        for name, (_, direction, damping) in found.items():
            factor = scale * (damping if self.options["scaling"] == "kl_norm" else 1.0)
            self._move(name, factor * direction, lr)

    def _decayed(self, name: str, layer: Seen) -> list[Array | None]:
        grads = [layer.weight_grad, layer.bias_grad]
        if self.options["weight_decay_type"] == "l2":
            decay = self.options["weight_decay"]
            grads = [
                None if g is None else g + decay * w
                for g, w in zip(grads, self.params[name], strict=True)
            ]
        return grads

    def _joint(self, grads: list[Array | None]) -> Array:
        weight, bias = grads
        assert weight is not None
        if self.method == "EvaS":
            return weight.reshape(len(weight), -1) if self.options["merge"] == "matrix" else weight
        matrix = weight.reshape(len(weight), -1)
        return matrix if bias is None else np.concatenate([matrix, bias[:, None]], axis=1)

    def _damping(self, name: str, layer: Seen, joint: Array) -> float:
        """Averages the statistics, too."""
        xi = self.options["statistics_decay"]
        if self.method != "EvaS":
            rows = max(1, len(layer.inputs))
            a, b = layer.inputs.sum(0) / rows, layer.output_grads.sum(0)
            if self.options.get("kv_scale") == "batch_mean":
                b = b / self.options["kv_batch_size"]
            if layer.bias_grad is not None:
                a = np.append(a, 1.0)
            if name in self.average:
                old_a, old_b = self.average[name]
                a, b = xi * old_a + (1 - xi) * a, xi * old_b + (1 - xi) * b
                if not len(layer.inputs):
                    a, b = old_a, old_b
            if len(layer.inputs):
                self.average[name] = a, b
            eigenvalue = a @ a * (b @ b if self.method == "Eva" else 1.0)
        else:
            means = [
                joint.mean(axis=tuple(d for d in range(joint.ndim) if d != dim))
                for dim in range(joint.ndim)
            ]
            eigenvalue = float(np.prod([v @ v for v in means]))
        if name in self.eigenvalue:
            eigenvalue = xi * self.eigenvalue[name] + (1 - xi) * eigenvalue
        self.eigenvalue[name] = eigenvalue
        relative = self.options["damping_mode"] == "relative"
        return self.options["damping"] * (eigenvalue if relative else 1.0)

    def _direction(self, name: str, joint: Array, damping: float) -> Array:
        if not joint.any():  # perhaps without rows up to now
            return joint
        if self.method == "EvaS":
            return eva_s(joint, damping)
        if name not in self.average:
            return joint / damping
        a, b = self.average[name]
        return eva(joint, a, b, damping) if self.method == "Eva" else eva_f(joint, a, damping)

    def _scale(self, found: list[tuple[Array, Array, float]], lr: float) -> float:
        scaling = self.options["scaling"]
        inner = sum(float(np.vdot(g, p)) for g, p, _ in found)
        if scaling == "kl_clip":
            return float(min(1.0, (self.options["kl_clip"] / (lr**2 * inner)) ** 0.5))
        if scaling == "norm":
            grad_square = sum(float(np.vdot(g, g)) for g, _, _ in found)
            return float((grad_square / sum(float(np.vdot(p, p)) for _, p, _ in found)) ** 0.5)
        if scaling == "kl_norm":
            return float(sum(y * float(np.vdot(g, p)) for g, p, y in found) ** -0.5)
        return 1.0

    def _move(self, name: str, direction: Array, lr: float) -> None:
        weight, bias = self.params[name]
        matrix = direction.reshape(len(weight), -1)
        parts = [(weight, matrix[:, : weight[0].size].reshape(weight.shape))]
        if bias is not None and self.method != "EvaS":
            parts.append((bias, matrix[:, -1]))
        for index, (param, step) in enumerate(parts):
            step = step + self._decay(lr) * param
            momentum, dampening = self.options["momentum"], self.options["dampening"]
            if momentum:
                old = self.buffers.get((name, index), np.zeros_like(param))
                buffer = momentum * old + (1 - dampening) * step
                self.buffers[name, index] = buffer
                nesterov = (1 - dampening) * step + momentum * buffer
                step = nesterov if self.options["nesterov"] else buffer
            param -= lr * step

    def _decay(self, lr: float) -> float:
        decay, peak = self.options["weight_decay"], self.options["lr"]
        kinds = {"l2": 0.0, "decoupled": 1.0, "corrected": lr / peak, "independent": 1 / peak}
        return decay * kinds[self.options["weight_decay_type"]]
