"""Impossible options are refused at construction, by name."""

from typing import Any

import pytest
import torch

from titan_shampoo import EvaS, Shampoo

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "negative lr": ({"lr": -1.0}, "lr: got -1.0, wanted at least 0"),
    "beta1 of 1": ({"betas": (1.0, 0.9)}, "betas: got"),
    "beta3 of 1": ({"beta3": 1.0}, "beta3: got 1.0"),
    "no damping": ({"eps": 0.0}, "eps: got 0.0, wanted a finite number greater than 0"),
    "empty blocks": ({"block_size": 0}, "block_size: got 0"),
    "one size in a pair": ({"block_size": (3,)}, "block_size: got"),
    "a pair for paper": ({"block_size": (3, 4), "merge": "paper"}, "block_size: got"),
    "negative exponent": ({"exponent": -0.5}, "exponent: got -0.5"),
    "one exponent for two dims": (
        {"exponent": (0.5,)},
        "0.weight: exponent has 1 numbers, wanted 2",
    ),
    "no whole root": ({"exponent": 0.3, "root_method": "newton"}, "exponent: got 0.3"),
    "unknown merge": ({"merge": "all"}, "merge: got 'all', wanted one of"),
    "period of zero": ({"precondition_frequency": 0}, "precondition_frequency: got 0"),
    "nesterov alone": ({"nesterov": True}, "nesterov: got True with momentum 0"),
    "dampening alone": ({"dampening": 0.5}, "dampening: got 0.5 with momentum 0"),
    "adam that forgets nothing": ({"betas": (0.9, 1.0)}, "betas: got 1 for second moments"),
}


@pytest.mark.parametrize("case", WRONG)
def test_impossible_option_is_refused_by_name(case: str) -> None:
    options, message = WRONG[case]
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Shampoo(model.named_parameters(), **options)


def test_orders_whose_roots_products_do_not_give_are_refused_by_name() -> None:
    """Of three dims the exponent is 1/6, which no repeated square root is."""
    kernel = torch.nn.Parameter(torch.zeros(6, 4, 3, 3))
    options: dict[str, Any] = {"merge": "paper", "block_size": 9, "root_method": "newton_schulz"}
    wanted = r"^conv: exponent is 1/6 of its 3 dims, wanted 1/2, 1/4, 1/8"
    with pytest.raises(ValueError, match=wanted):
        Shampoo([("conv", kernel)], **options)
    matrix = torch.nn.Parameter(torch.zeros(6, 4))
    whole = [("matrix", matrix), ("conv", kernel)]
    with pytest.raises(ValueError, match=wanted):  # as on the stage that has it
        Shampoo([("matrix", matrix)], all_params=whole, **options)
    Shampoo([("conv", kernel)], **options, exponent=0.25)


def test_complex_parameter_is_refused_by_name() -> None:
    weight = torch.zeros(2, 2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ValueError, match="wanted a real dtype"):
        Shampoo([("w", weight)])


def test_sparse_gradient_is_refused_by_name() -> None:
    weight = torch.zeros(2, 2, requires_grad=True)
    optimizer = Shampoo([("w", weight)])
    weight.grad = torch.eye(2).to_sparse()
    with pytest.raises(ValueError, match="w: got a sparse gradient"):
        optimizer.step()


@pytest.mark.parametrize("method", [Shampoo, EvaS])
def test_parameters_without_names_are_warned_about_where_they_are_given(method: Any) -> None:
    with pytest.warns(UserWarning, match="without names") as warned:
        method([torch.zeros(2, 2, requires_grad=True)])
    assert [one.filename for one in warned] == [__file__]


@pytest.mark.parametrize("method", [Shampoo, EvaS])
def test_state_of_groups_without_names_has_a_name_for_each_parameter(method: Any) -> None:
    groups = [{"params": [torch.zeros(2, 2, requires_grad=True)]} for _ in range(2)]
    with pytest.warns(UserWarning, match="without names"):
        optimizer = method(groups)
    assert list(optimizer.sharded_state()) == ["0", "1"]


@pytest.mark.parametrize("method", [Shampoo, EvaS])
def test_a_name_of_two_parameters_is_refused(method: Any) -> None:
    both = [("w", torch.zeros(2, 2, requires_grad=True)) for _ in range(2)]
    with pytest.raises(ValueError, match="w: is the name of two parameters"):
        method(both)
    optimizer = method(both[:1])
    with pytest.raises(ValueError, match="w: is the name of two parameters"):
        optimizer.add_param_group({"params": both[1:]})
    assert len(optimizer.param_groups) == 1
