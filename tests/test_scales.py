"""What becomes of a step when all gradients are multiplied by c, as docs/algorithms.md has it.

By powers of two from 2^-40 to 2^40, about 1e-12 to 1e12, in float32: these round nothing, so that
nothing but a number that leaves the range of float32 can make a difference.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.eva_directions import eva_s
from titan_shampoo import FOOF, KFAC, SOAP, Eva, EvaF, EvaS, KLShampoo, Shampoo
from titan_shampoo.functional.roots import inverse_root

EXTREMES = [2.0**power for power in (-40, -27, -13, 13, 27, 40)]
TOLERANCE = 2e-6
STEPS = 4


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(optimizer: Any, weight: Tensor, c: float) -> Tensor:
    """The move of a weight from zero by gradients that are c times as large."""
    for step in range(STEPS):
        weight.grad = normal(step, *weight.shape) * c
        optimizer.step()
    assert optimizer.skipped_steps == 0
    return weight.detach().double()


def assert_power(found: Tensor, reference: Tensor, factor: float) -> None:
    """That ``found`` is ``factor`` times ``reference``, which is not nothing."""
    assert reference.norm() > 0
    assert (found / factor - reference).norm() <= TOLERANCE * reference.norm()


# Blocks: not at all, if what is added to second moments grows with them

SHAPES: dict[int, tuple[int, ...]] = {1: (24,), 2: (24, 16), 3: (8, 6, 5)}
EPS = {"Shampoo": ("eps", 2), "SOAP": ("eps", 1)}
BLOCKS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "Shampoo, adam": (Shampoo, 0, {"eps": 1e-8}),
    "Shampoo, rmsprop": (Shampoo, 0, {"grafting": "rmsprop", "eps": 1e-8}),
    "Shampoo, adagrad": (Shampoo, 0, {"grafting": "adagrad", "eps": 1e-8}),
    "Shampoo, sgd": (Shampoo, 1, {"grafting": "sgd", "eps": 1e-8}),
    "Shampoo, not grafted": (Shampoo, 0, {"grafting": None, "start_step": 1, "eps": 1e-8}),
    "Shampoo, matched": (Shampoo, 0, {"grafting": None, "match_rms": 0.2, "eps_relative": 1e-6}),
    "Shampoo, relative": (Shampoo, 0, {"eps_relative": 1e-6}),
    "Shampoo, sums": (Shampoo, 0, {"betas": (0.9, 1.0), "grafting": "adagrad", "fallback": None,
                                   "eps_relative": 1e-6}),
    "Shampoo, newton": (Shampoo, 0, {"root_method": "newton", "eps_relative": 1e-5}),
    "Shampoo, newton_schulz": (Shampoo, 0, {"root_method": "newton_schulz", "eps_relative": 1e-5}),
    "Shampoo, qr": (Shampoo, 0, {"root_method": "qr", "eps_relative": 1e-6}),
    "SOAP": (SOAP, 0, {}),
    "SOAP, eigh": (SOAP, 0, {"basis_method": "eigh"}),
    "KL-Shampoo": (KLShampoo, 0, {}),
    "KL-Shampoo, sgd": (KLShampoo, 1, {"grafting": "sgd"}),
    "KL-Shampoo, not grafted": (KLShampoo, 0, {"grafting": None}),
}  # fmt: skip


def step_of_blocks(name: str, order: int, c: float) -> Tensor:
    make, _, options = BLOCKS[name]
    extra: dict[str, Any] = {"merge": "none"} if order == 3 else {}
    eps, power = EPS.get(make.__name__, ("eps", 0))
    if "eps" in options or make is SOAP:
        extra[eps] = options.get(eps, 1e-8) * c**power
    if make is not SOAP:
        extra["grafting_eps"] = 1e-8 * c
    weight = nn.Parameter(torch.zeros(SHAPES[order]))
    options = {"fallback": None, "precondition_frequency": 2, **options, **extra}
    return moved(make([("weight", weight)], lr=1.0, **options), weight, c)


@pytest.mark.parametrize("order", SHAPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_move_alike_whatever_the_size_of_gradients(name: str, order: int) -> None:
    if order == 3 and name.endswith("newton_schulz"):
        pytest.skip("refused: products find no sixth root")
    reference = step_of_blocks(name, order, 1.0)
    for c in EXTREMES:
        assert_power(step_of_blocks(name, order, c), reference, c ** BLOCKS[name][1])


def test_an_absolute_eps_far_above_the_factors_leaves_the_filtered_gradient() -> None:
    """As long as the grafted step: what Shampoo's default does with gradients of 1e-9."""
    weight = nn.Parameter(torch.zeros(6, 4))
    optimizer = Shampoo([("weight", weight)], lr=1.0, betas=(0.0, 0.999), start_step=1,
                        precondition_frequency=1, grafting_eps=1e-30)  # fmt: skip
    weight.grad = normal(0, 6, 4) * 2.0**-40
    optimizer.step()
    expected = -weight.grad / weight.grad.norm() * math.sqrt(24)  # Adam's first step has entries 1
    assert torch.allclose(weight, expected, rtol=1e-4)


def test_a_new_direction_at_large_gradients_is_stepped_along() -> None:
    """An absolute eps of 1e-36 of the factors made it so long that its square overflowed."""
    weight = nn.Parameter(torch.zeros(256, 256))
    optimizer = Shampoo([("weight", weight)], lr=1.0, betas=(0.0, 0.999), start_step=1,
                        precondition_frequency=10)  # fmt: skip
    for step in range(4):
        before = weight.detach().clone()
        weight.grad = torch.outer(normal(step, 256), normal(10 + step, 256)) * 1e12
        optimizer.step()
        assert (weight - before).norm() > 1


# Layers


class Net(nn.Module):
    """A convolution and two linear layers; weights are so small that moves are all there is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.wide, self.last = nn.Conv2d(2, 4, 3), nn.Linear(64, 8), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(images)).flatten(1)
        return self.last(torch.tanh(self.wide(hidden)))


def step_of_layers(make: Any, c: float, **options: Any) -> Tensor:
    """The momentum of all weights, which stay as they are."""
    net = Net()
    own = {} if make is EvaS else {"model": net}
    optimizer = make(net.named_parameters(), **own, lr=1e-3, momentum=0.5, fallback_lr=0.0,
                     **options)  # fmt: skip
    start = {name: value.clone() for name, value in net.state_dict().items()}
    for step in range(STEPS):
        optimizer.zero_grad()
        images, weights = normal(step, 6, 2, 6, 6), normal(100 + step, 6, 5)
        ((net(images) * weights).mean() * c).backward()
        optimizer.step()
        net.load_state_dict(start)
    assert optimizer.skipped_steps == 0
    return torch.cat([
        optimizer.state[p]["momentum"].flatten().double() for p in net.parameters() if p.ndim > 1
    ])  # fmt: skip


# Powers of c by scaling, where damping grows as the curvature does.
TWO_SIDED = {None: -1, "norm": 1, "kl_norm": 0}
INPUTS_ONLY = {None: 1, "norm": 1, "kl_norm": 0}
LAYERS: dict[str, tuple[Any, dict[str | None, int], dict[str, Any]]] = {
    "Eva": (Eva, TWO_SIDED, {"damping": 0.3}),
    "Eva-f": (EvaF, INPUTS_ONLY, {}),
    "FOOF": (FOOF, INPUTS_ONLY, {"precondition_frequency": 1}),
    "K-FAC": (KFAC, TWO_SIDED, {"damping": 0.3, "precondition_frequency": 2}),
    "K-FAC, exact": (KFAC, TWO_SIDED, {"damping": 0.3, "factored_damping": False}),
}


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("scaling", [None, "norm", "kl_norm", "kl_clip"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_move_by_a_power_of_the_size_of_gradients(
    name: str, scaling: str | None, mode: str
) -> None:
    make, powers, options = LAYERS[name]
    if scaling == "kl_norm" and make in (FOOF, KFAC):
        pytest.skip("refused")

    def found(c: float) -> Tensor:
        given = options | {"scaling": scaling, "damping_mode": mode}
        if mode == "absolute" and powers is TWO_SIDED:
            given["damping"] = 1e-4 * c**2
        if scaling == "kl_clip":  # always clipped: the change of predictions is that of the clip
            given["kl_clip"] = 1e-34 if powers is INPUTS_ONLY else 1e-12
        return step_of_layers(make, c, **given)

    power = powers.get(scaling, 0 if powers is INPUTS_ONLY else -1)
    reference = found(1.0)
    for c in EXTREMES:
        assert_power(found(c), reference, c**power)


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_far_above_the_curvature_damping_is_all_that_divides(mode: str) -> None:
    """Eva of small gradients with absolute damping is the gradient over it."""
    small, smaller = (step_of_layers(Eva, c, scaling=None, damping_mode=mode)
                      for c in (2.0**-20, 2.0**-40))  # fmt: skip
    assert_power(smaller, small, 2.0 ** (-20 if mode == "absolute" else 20))


# Eva-s

S_SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "order 2": ((64, 32), {}),
    "order 3": ((8, 6, 5), {"merge": "none"}),
    "order 4": ((8, 6, 3, 3), {"merge": "none"}),
    "stack": ((3, 8, 6), {"batch_dims": 1}),
}


def step_of_eva_s(shape: tuple[int, ...], c: float, **options: Any) -> Tensor:
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = EvaS([("layer.weight", weight)], **{"lr": 1.0, "momentum": 0.0, **options})
    return moved(optimizer, weight, c)


@pytest.mark.parametrize("scaling", [None, "norm"])
@pytest.mark.parametrize("kind", S_SHAPES)
def test_eva_s_moves_as_far_as_the_gradient_is_long(kind: str, scaling: str | None) -> None:
    shape, options = S_SHAPES[kind]
    reference = step_of_eva_s(shape, 1.0, scaling=scaling, **options)
    for c in EXTREMES:
        assert_power(step_of_eva_s(shape, c, scaling=scaling, **options), reference, c)


@pytest.mark.parametrize("kind", ["order 2", "order 3"])
def test_eva_s_has_other_powers_only_where_they_are_asked_for(kind: str) -> None:
    shape, options = S_SHAPES[kind]
    order = len(shape)
    absolute = {"damping_mode": "absolute"}
    for extra, power, damping_power in (
        ({"scaling": "kl_clip", "lr": 1e3, "kl_clip": 1e-34}, 0, None),
        ({"scaling": "kl_norm"}, order, None),
        ({"scaling": None, **absolute}, 1, 2 * order),
        ({"scaling": "kl_norm", **absolute}, order, 2 * order),
    ):

        def found(c: float, extra: Any = extra, power: Any = damping_power) -> Tensor:
            damping = {} if power is None else {"damping": 1e-3 * c**power}
            return step_of_eva_s(shape, c, **options, **extra, **damping)

        reference = found(1.0)
        for c in EXTREMES:
            assert_power(found(c), reference, c**power)


@given(st.floats(-17, 17), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_eva_s_is_as_long_as_any_gradient_whose_square_is_a_float(power: float, seed: int) -> None:
    grad = normal(seed, 9, 7) * 10.0**power
    weight = nn.Parameter(torch.zeros(9, 7))
    optimizer = EvaS([("layer.weight", weight)], lr=1.0, momentum=0.0)
    weight.grad = grad
    optimizer.step()
    assert float(weight.detach().double().norm() / grad.double().norm()) == pytest.approx(
        1, rel=1e-4
    )
    found = eva_s(grad, damping=0.3)
    assert float(found.double().norm() / grad.double().norm()) == pytest.approx(1, rel=1e-4)


# Beyond the range: counted, and nothing moves

METHODS: dict[str, Any] = {
    "Shampoo": lambda named: Shampoo(named, lr=0.1, start_step=1),
    "SOAP": lambda named: SOAP(named, lr=0.1),
    "KLShampoo": lambda named: KLShampoo(named, lr=0.1),
    "EvaS": lambda named: EvaS(named, lr=0.1),
}


@pytest.mark.parametrize("size", [1e20, 1e30, 3e38])
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_whose_square_is_no_float_is_skipped(method: str, size: float) -> None:
    weight = nn.Parameter(torch.zeros(6, 4))
    optimizer = METHODS[method]([("layer.weight", weight)])
    weight.grad = normal(0, 6, 4)
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.full((6, 4), size)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(weight, before)


@pytest.mark.parametrize("size", [1e-20, 1e-24, 1e-30, 1e-38])
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_whose_square_is_zero_moves_nothing_far(method: str, size: float) -> None:
    weight = nn.Parameter(torch.zeros(6, 4))
    optimizer = METHODS[method]([("layer.weight", weight)])
    for step in range(3):
        weight.grad = normal(step, 6, 4) * size
        optimizer.step()
    assert weight.isfinite().all()
    assert weight.abs().max() < 1


def test_eva_s_takes_a_gradient_whose_square_is_zero_as_it_is() -> None:
    weight = nn.Parameter(torch.zeros(6, 4))
    optimizer = EvaS([("layer.weight", weight)], lr=1.0, momentum=0.0)
    weight.grad = normal(0, 6, 4) * 1e-30
    optimizer.step()
    assert torch.allclose(weight / 1e-30, -weight.grad / 1e-30)


@pytest.mark.parametrize("grafting", ["adam", None])
def test_a_direction_beyond_the_range_rests_and_is_counted_in_the_next_step(
    grafting: Any, caplog: pytest.LogCaptureFixture
) -> None:
    weight = nn.Parameter(torch.zeros(24, 16))
    optimizer = Shampoo([("weight", weight)], lr=1.0, exponent=1.0, grafting=grafting,
                        eps_relative=1e-6, start_step=1, precondition_frequency=1)  # fmt: skip
    for step in range(3):
        weight.grad = normal(step, 24, 16) * 1e-12
        optimizer.step()
    assert optimizer.skipped_steps == 2
    assert not weight.any()
    assert "step skipped: it had a direction that is beyond the range" in caplog.text


def test_a_layer_whose_direction_is_beyond_the_range_rests_alone() -> None:
    layers = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)
    model, (dead, alive) = nn.Sequential(*layers), [layer.weight for layer in layers]
    groups = [{"params": [("0.weight", dead)], "damping": 1e-38}, {"params": [("1.weight", alive)]}]
    optimizer = FOOF(groups, model=model, lr=0.1, scaling="norm", weight_decay=1.0,
                     weight_decay_type="l2", momentum=0.0)  # fmt: skip
    before = [weight.detach().clone() for weight in (dead, alive)]
    for _ in range(2):
        optimizer.zero_grad()
        (layers[0](torch.zeros(5, 4)).sum() + layers[1](torch.ones(5, 3)).sum()).backward()
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(dead, before[0])
    assert not torch.equal(alive, before[1])
    assert alive.isfinite().all()


def test_moments_of_large_gradients_are_measured() -> None:
    """Norms of them would square squares; the step was skipped from gradients of 1e10 on."""
    step_of_layers(KFAC, 2.0**50, precondition_frequency=1)


# Roots


@pytest.mark.parametrize("method", ["eigh", "newton", "newton_schulz"])
def test_roots_are_those_of_any_multiple_of_a_matrix(method: Any) -> None:
    half = normal(0, 2, 12, 20)
    matrices = half @ half.mT
    reference = inverse_root(matrices, 0.25, eps=1.0, eps_relative=1e-5, method=method).root
    for power in (-100, -40, 40, 80):
        found = inverse_root(matrices * 2.0**power, 0.25, eps=1.0, eps_relative=1e-5, method=method)
        assert torch.allclose(found.root * 2.0 ** (power / 4), reference, rtol=1e-5)
