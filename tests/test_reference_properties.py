"""The references of SOAP and KL-Shampoo have the properties that their papers state."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.reference.blocks import Array
from tests.reference.kl_shampoo import KLShampoo
from tests.reference.shampoo import Options, Shampoo, root_by_eigh, root_by_newton
from tests.reference.soap import SOAP, SOAPByQR

Method = Callable[..., Shampoo]
SOAP_OPTIONS = Options(eps=1e-8, start_step=1, betas=(0.9, 0.95), precondition_frequency=3)


def noise(step: int, shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(step).standard_normal(shape)


def iterates(method: Method, options: Options, shape: tuple[int, ...], steps: int) -> list[Array]:
    """Steps with learning rate 1 on noise and drift."""
    optimizer = method({"w": np.zeros(shape)}, options, peak_lr=1.0)
    found = [np.zeros(shape)]
    for step in range(1, steps + 1):
        optimizer.step({"w": noise(step, shape) + noise(0, shape)}, 1.0)
        found.append(optimizer.weights["w"].copy())
    return found


def test_newton_and_eigh_give_the_same_roots() -> None:
    rows = noise(1, (6, 9))
    for power in (1 / 2, 1 / 4, 1 / 6):
        one = root_by_eigh(rows @ rows.T, power, 1e-3)
        other = root_by_newton(rows @ rows.T, power, 1e-3, 1e-12)
        assert np.abs(one - other).max() < 1e-10


@pytest.mark.parametrize("frequency", [1, 10])
@pytest.mark.parametrize("shape", [(16,), (24, 24), (12, 40), (64, 64), (6, 4, 3, 3)])
@pytest.mark.parametrize("method", [SOAP, SOAPByQR])
def test_soap_takes_no_step_above_20(
    method: Method, shape: tuple[int, ...], frequency: int
) -> None:
    options = Options(eps=1e-8, start_step=1, precondition_frequency=frequency)
    path = iterates(method, options, shape, 60)
    assert max(float(np.abs(d).max()) for d in np.diff(path, axis=0)) < 20


@pytest.mark.parametrize("method", [SOAP, SOAPByQR])
def test_soap_only_makes_its_basis_in_the_first_step(method: Method) -> None:
    path = iterates(method, SOAP_OPTIONS, (6, 8), 2)
    assert not path[1].any()
    assert path[2].any()


def test_soap_does_not_depend_on_the_coordinates() -> None:
    left, right = np.linalg.qr(noise(7, (6, 6)))[0], np.linalg.qr(noise(8, (8, 8)))[0]
    one = SOAP({"w": np.zeros((6, 8))}, SOAP_OPTIONS, peak_lr=1.0)
    other = SOAP({"w": np.zeros((6, 8))}, SOAP_OPTIONS, peak_lr=1.0)
    # The first gradient leaves two eigenvalues of the right factor at zero, whose eigenvectors are
    # arbitrary; several gradients at once do not.
    for step in range(1, 13):
        grad = noise(step, (6, 8))
        for optimizer, g in ((one, grad), (other, left @ grad @ right.T)):
            if step == 1:
                block = optimizer.blocks["w"][0]
                for n in range(20, 26):
                    g_before = noise(n, (6, 8))
                    block.accumulate(g_before if optimizer is one else left @ g_before @ right.T)
            optimizer.step({"w": g}, 1.0)
    difference = other.weights["w"] - left @ one.weights["w"] @ right.T
    assert np.abs(difference).max() < 1e-9


def test_soap_in_a_fixed_basis_is_adam_in_it() -> None:
    options = Options(eps=1e-8, start_step=1, precondition_frequency=1000)
    optimizer = SOAP({"w": np.zeros((5, 7))}, options, peak_lr=1.0)
    optimizer.step({"w": noise(1, (5, 7))}, 1.0)
    left, right = optimizer.blocks["w"][0].bases  # type: ignore[attr-defined]  # a block of SOAP's
    first = second = weight = np.zeros((5, 7))
    for age in range(1, 15):
        grad = noise(1 + age, (5, 7))
        inside = left.T @ grad @ right
        first, second = 0.9 * first + 0.1 * inside, 0.999 * second + 0.001 * inside**2
        adam = (first / (1 - 0.9**age)) / (np.sqrt(second / (1 - 0.999**age)) + 1e-8)
        weight = weight - left @ adam @ right.T
        optimizer.step({"w": grad}, 1.0)
        assert np.allclose(optimizer.weights["w"], weight, rtol=0, atol=1e-10)


def test_kl_shampoo_finds_a_kronecker_covariance_with_its_scale() -> None:
    left, right = np.diag([1.0, 2.0, 5.0]), np.diag([0.5, 1.0, 3.0, 4.0])
    options = Options(betas=(0.0, 0.998), start_step=1, precondition_frequency=5)
    optimizer = KLShampoo({"w": np.zeros((3, 4))}, options, peak_lr=1.0)
    for step in range(1, 6001):
        optimizer.step({"w": np.sqrt(left) @ noise(step, (3, 4)) @ np.sqrt(right)}, 0.0)
    factors = optimizer.blocks["w"][0].factors
    # A gradient with covariance kron(left, right) is whitened: 8% is the noise of 500 samples.
    ratio = np.diag(np.kron(*factors)) / np.diag(np.kron(left, right))
    assert np.abs(ratio - 1).max() < 0.2
    assert abs(np.log(ratio).mean()) < 0.08


def test_kl_shampoo_factors_start_in_units_of_the_first_gradient_and_see_the_roots_before() -> None:
    options = Options(betas=(0.0, 0.9), start_step=1, precondition_frequency=1)
    optimizer = KLShampoo({"w": np.zeros((3, 4))}, options, peak_lr=1.0)
    size = np.sqrt(np.mean(noise(1, (3, 4)) ** 2))
    left, right = size * np.eye(3), size * np.eye(4)
    for step in range(1, 6):
        grad = noise(step, (3, 4))
        inverses = np.linalg.inv(left), np.linalg.inv(right)
        left = 0.9 * left + 0.1 * grad @ inverses[1] @ grad.T / 4
        right = 0.9 * right + 0.1 * grad.T @ inverses[0] @ grad / 3
        before = optimizer.weights["w"].copy()
        optimizer.step({"w": grad}, 1.0)
        values, vectors = np.linalg.eigh(np.kron(left, right))
        whitened = vectors @ np.diag(values**-0.5) @ vectors.T @ grad.ravel()
        assert np.allclose(before - optimizer.weights["w"], whitened.reshape(3, 4), atol=1e-10)
