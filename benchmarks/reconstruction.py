"""Autoencoders of scikit-learn's digits, and how each optimizer trains them.

The loss is summed over pixels and averaged over samples, as curvature methods want it; what is
reported is the mean square error of a pixel over the whole training set.
"""

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import interpolate

from titan_shampoo import FOOF, KFAC, SOAP, Eva, EvaF, EvaS, Shampoo


@functools.cache
def images(edge: int) -> Tensor:
    """The digits with ``edge`` pixels along each side, ``(1797, edge * edge)`` in [0, 1]."""
    pixels = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16
    return interpolate(pixels, (edge, edge), mode="bilinear").flatten(1)


@dataclass(frozen=True, slots=True)
class Task:
    """A network, its data, and how long it is trained.

    The learning rate rises linearly through the first epoch and falls linearly to zero at the end.
    """

    sizes: tuple[int, ...]
    """Units of the layers, from pixels to code and back."""
    edge: int
    """Pixels along each side of an image."""
    epochs: int = 15
    batch: int = 128
    ranges: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    """By method, ranges of settings that replace the method's own."""

    @property
    def num_steps(self) -> int:
        """Of a whole run; the last, smaller batch of an epoch is left out."""
        return self.epochs * (len(images(self.edge)) // self.batch)

    def rate(self, step: int) -> float:
        """Share of the learning rate in a step, counted from 0."""
        warm_up = self.num_steps // self.epochs
        return min((step + 1) / warm_up, (self.num_steps - step) / (self.num_steps - warm_up))

    def network(self, seed: int) -> nn.Sequential:
        """Linear layers (He et al. 2015) with ReLU between them; code and output are linear."""
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for depth, (inputs, outputs) in enumerate(zip(self.sizes, self.sizes[1:], strict=False), 1):
            linear = nn.Linear(inputs, outputs)
            nn.init.kaiming_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            is_linear = depth in (len(self.sizes) // 2, len(self.sizes) - 1)
            layers += [linear] if is_linear else [linear, nn.ReLU()]
        return nn.Sequential(*layers)


TASKS = {
    "small": Task((64, 100, 50, 25, 8, 25, 50, 100, 64), edge=8),
    # A sum over twelve times as many pixels: SGD diverges with most of its rates for the small one,
    # and Eva, whose damping is to be of the order of |a|^2 |b|^2, with most of its dampings.
    "large": Task(
        (784, 1000, 500, 250, 30, 250, 500, 1000, 784),
        edge=28,
        ranges={"SGD": {"lr": (1e-5, 1e-3)}, "Eva": {"damping": (1e1, 1e4)}},
    ),
}


@dataclass(frozen=True, slots=True)
class Method:
    """An optimizer, what of it is tried, and what is fixed for all trials."""

    build: Callable[..., torch.optim.Optimizer]
    lr: tuple[float, float]
    """Range of the learning rate, log-uniform."""
    damping: tuple[float, float] | None = None
    """Range of the damping, log-uniform; None where there is none."""
    needs_model: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def optimizer(self, model: nn.Module, settings: Mapping[str, float]) -> torch.optim.Optimizer:
        """For ``model``, with what a trial has chosen."""
        own = {"model": model} if self.needs_model else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.build(model.named_parameters(), **settings, **own, **self.fixed)

    def trials(
        self, count: int, replaced: Mapping[str, tuple[float, float]]
    ) -> list[dict[str, float]]:
        """``count`` settings, spread evenly (a Kronecker sequence) over the ranges."""
        ranges = {"lr": self.lr} | ({} if self.damping is None else {"damping": self.damping})
        ranges |= replaced
        return [
            {
                name: float(f"{low * (high / low) ** place:.3g}")
                for (name, (low, high)), place in zip(ranges.items(), point, strict=True)
            }
            for point in _even_points(count, len(ranges))
        ]


def _even_points(count: int, dims: int) -> Iterator[list[float]]:
    """Points in [0, 1)^dims by multiples of powers of a generalised golden ratio."""
    ratio = 2.0
    for _ in range(40):
        ratio = (1 + ratio) ** (1 / (dims + 1))
    for number in range(1, count + 1):
        yield [(0.5 + number * ratio ** -(dim + 1)) % 1 for dim in range(dims)]


_NEVER_SKIPS_TOO_OFTEN: Mapping[str, Any] = {"max_skipped": 10**9}
_NEVER_GIVES_UP: Mapping[str, Any] = {**_NEVER_SKIPS_TOO_OFTEN, "max_failures": 10**9}
_BLOCKS = {**_NEVER_GIVES_UP, "betas": (0.9, 0.99), "block_size": 1024}


def _layers(
    build: Callable[..., torch.optim.Optimizer],
    lr: tuple[float, float],
    damping: tuple[float, float],
) -> Method:
    """A method for layers, with its defaults."""
    fixed = _NEVER_GIVES_UP if build in (FOOF, KFAC) else _NEVER_SKIPS_TOO_OFTEN
    return Method(build, lr, damping, needs_model=build is not EvaS, fixed=fixed)


METHODS: dict[str, Method] = {
    "SGD": Method(torch.optim.SGD, (1e-4, 1e-1), fixed={"momentum": 0.9}),
    "AdamW": Method(torch.optim.AdamW, (3e-4, 1e-1), fixed={"weight_decay": 0.0}),
    "Eva": _layers(Eva, (1e-2, 3.0), (1e-1, 1e2)),
    "EvaF": _layers(EvaF, (3e-3, 3.0), (1e-3, 1e2)),
    "EvaS": _layers(EvaS, (1e-4, 1e-1), (1e-2, 1e2)),
    "FOOF": _layers(FOOF, (3e-3, 3.0), (1e-3, 1e1)),
    "KFAC": _layers(KFAC, (3e-3, 3.0), (1e-3, 1e2)),
    "Shampoo": Method(Shampoo, (3e-4, 1e-1), fixed=_BLOCKS | {"start_step": 1}),
    "SOAP": Method(SOAP, (3e-4, 1e-1), fixed=_BLOCKS),
}


class Training:
    """One run, step by step, with its own clock.

    Args:
        task: What is trained.
        method: Name of the optimizer.
        settings: Learning rate and damping.
        seed: Of weights and batches; equal for all methods, so that runs are paired.
    """

    def __init__(self, task: Task, method: str, settings: Mapping[str, float], seed: int) -> None:
        self.task, self.lr = task, settings["lr"]
        self.images = images(task.edge)
        self.model = task.network(seed)
        self.optimizer = METHODS[method].optimizer(self.model, settings)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.steps = 0
        self.seconds = 0.0

    def advance(self, count: int) -> None:
        """Take ``count`` steps; a run that has diverged stands still."""
        for _ in range(count):
            if len(self.order) < self.task.batch:
                self.order = torch.randperm(len(self.images), generator=self.generator)
            chosen, self.order = self.order[: self.task.batch], self.order[self.task.batch :]
            batch = self.images[chosen]
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * self.task.rate(self.steps)
            start = time.perf_counter()
            self.optimizer.zero_grad()
            loss = (self.model(batch) - batch).square().sum(1).mean()
            if loss.isfinite():
                loss.backward()
                self.optimizer.step()
            self.seconds += time.perf_counter() - start
            self.steps += 1

    @torch.no_grad()
    def loss(self) -> float:
        """Mean square error of a pixel over the training set; infinite if it diverged."""
        found = float((self.model(self.images) - self.images).square().mean())
        return found if math.isfinite(found) else math.inf
