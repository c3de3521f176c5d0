"""Which values the options of a parameter group may have.

Every rank has the same options, so every rank refuses the same ones, before any collective.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from titan_shampoo.functional.grafting import diagonal_beta2
from titan_shampoo.functional.roots import halvings


def _listed(value: Any) -> Sequence[Any]:  # noqa: ANN401 - one number or several
    return value if isinstance(value, (tuple, list)) else (value,)


Limit = tuple[Callable[[Any], bool], str]
"""Whether a value of any type is possible, and what is wanted."""


def is_count(value: object, least: int = 1, most: int = 2**63 - 1) -> bool:
    """Whether a value is a whole number from ``least`` to ``most``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def number(holds: Callable[[float], bool], *, optional: bool = False) -> Callable[[Any], bool]:
    """A test of values that are numbers for which ``holds``; NaN is never one of them.

    Args:
        holds: Says which numbers are possible.
        optional: Whether None is possible, too.
    """

    def test(value: object) -> bool:
        if value is None:
            return optional
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        try:
            return holds(float(value))
        except OverflowError:  # a whole number of hundreds of digits
            return False

    return test


def pair(
    first: Callable[[float], bool], second: Callable[[float], bool]
) -> Callable[[object], bool]:
    """A test of values that are two numbers for which ``first`` and ``second`` hold."""
    tests = (number(first), number(second))

    def test(value: object) -> bool:
        if not isinstance(value, (tuple, list)) or len(value) != len(tests):
            return False
        return all(holds(one) for holds, one in zip(tests, value, strict=True))

    return test


def is_rate(value: object) -> bool:
    """Whether a value is a learning rate: a number, or a tensor of one that the host can read."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.numel() != 1 or value.is_complex():
            return False
        value = value.item()
    return number(lambda x: 0 <= x < math.inf)(value)


def _is_size(value: object) -> bool:
    """Whether a value is the size of blocks, or one for rows and one for columns."""
    if isinstance(value, (tuple, list)):
        return len(value) == 2 and all(map(is_count, value))
    return is_count(value)


OPEN: Limit = (number(lambda x: 0 <= x < 1), "a number in [0, 1)")
_HALF: Limit = (number(lambda x: 0 < x <= 1, optional=True), "None or a number in (0, 1]")
POSITIVE: Limit = (number(lambda x: 0 < x < math.inf), "a finite number greater than 0")
NOT_NEGATIVE: Limit = (number(lambda x: 0 <= x < math.inf), "a finite number, at least 0")
STEPS: Limit = (is_count, "a whole number, at least 1")
# Work is planned for every step of a period.
PERIOD: Limit = (lambda x: is_count(x, most=10**6), "a whole number from 1 to 1,000,000")
_START: Limit = (lambda x: x is None or is_count(x, most=10**12), f"None or {STEPS[1]}")

LIMITS: dict[str, Limit] = {
    "lr": (is_rate, "at least 0: a finite number, or a tensor of one on the CPU"),
    "peak_lr": (is_rate, "at least 0: the largest learning rate of the schedule"),
    "max_lr": (is_rate, "at least 0: the largest learning rate of a scheduler"),
    "betas": (
        pair(lambda x: 0 <= x < 1, lambda x: 0 < x <= 1), "two numbers, in [0, 1) and (0, 1]"
    ),
    "eps": POSITIVE,
    "eps_relative": _HALF,
    "beta3": (number(lambda x: 0 <= x < 1, optional=True), "None or a number in [0, 1)"),
    "weight_decay": NOT_NEGATIVE,
    "momentum": OPEN,
    "dampening": (number(lambda x: 0 <= x <= 1), "a number in [0, 1]"),
    "block_size": (
        _is_size,
        "whole numbers, at least 1: one, or one for rows and one for columns",
    ),
    "batch_dims": (lambda x: is_count(x, 0), "a whole number, at least 0"),
    "precondition_frequency": PERIOD,
    "start_step": _START,
    "factor_frequency": PERIOD,
    "max_failures": STEPS,
    "max_skipped": STEPS,
    "grafting_beta2": _HALF,
    "grafting_eps": POSITIVE,
    "match_rms": (
        number(lambda x: 0 < x < math.inf, optional=True), "None or a finite number greater than 0"
    ),
    "exponent": (
        lambda x: x is None or all(map(NOT_NEGATIVE[0], _listed(x))),
        "None or numbers, at least 0: one, or one per dim",
    ),
}  # fmt: skip

SWITCH = (True, False)

CHOICES: dict[str, tuple[Any, ...]] = {
    "weight_decay_type": ("l2", "decoupled", "corrected", "independent"),
    "merge": ("matrix", "paper", "none"),
    "block_alignment": ("global", "shard"),
    "refresh": ("staggered", "together"),
    "grafting": (None, "sgd", "adagrad", "rmsprop", "adam"),
    "root_method": ("auto", "eigh", "newton", "newton_schulz", "qr"),
    "basis_method": ("eigh", "qr"),
    "degenerate_basis": ("previous", "arbitrary"),
    "factor_dtype": (None, torch.float32, torch.float64),
    "root_dtype": (None, torch.float32, torch.float64, torch.bfloat16),
    "basis_dtype": (None, torch.float32, torch.float64, torch.bfloat16),
    "communication_dtype": (None, torch.float32, torch.float64, torch.bfloat16),
    "state_dtype": (None, torch.float32, torch.float64, torch.bfloat16),
    "fallback": (None, "adamw"),
    "nesterov": SWITCH,
    "bias_correction": SWITCH,
    "compile": SWITCH,
    "precondition": (None, True, False),
}


_ARGUMENTS = (
    "self", "params", "model", "process_group", "all_params", "pipeline_group", "__class__"
)  # fmt: skip
"""What constructors of optimizers take beside options."""


def options_among(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options among the arguments of a constructor."""
    return {key: value for key, value in arguments.items() if key not in _ARGUMENTS}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what is impossible, alone or with the others.

    Args:
        options: A parameter group; methods have different options.

    Raises:
        ValueError: Naming the option, what was got and what is wanted.
    """
    check_alone(options, LIMITS, CHOICES)
    check_heavy_ball(options)
    _check_pairs(options)
    _check_exponents(options)


def check_alone(
    options: Mapping[str, Any],
    limits: Mapping[str, Limit],
    choices: Mapping[str, Sequence[Any]],
) -> None:
    """Refuse what is impossible whatever the other options are.

    Raises:
        ValueError: Naming the option, what was got and what is wanted.
    """
    for key, (holds, wanted) in limits.items():
        if key in options and not holds(options[key]):
            raise ValueError(f"{key}: got {shown(options[key])}, wanted {wanted}")
    for key, some in choices.items():
        if key in options and not any(_is_same(options[key], one) for one in some):
            raise ValueError(f"{key}: got {shown(options[key])}, wanted one of {some}")


def shown(value: object) -> str:
    """A value of any type in less than a line, for errors."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a tensor of shape {tuple(value.shape)}"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # a whole number of thousands of digits
        text = f"one of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _is_same(value: object, choice: object) -> bool:
    """Whether a value is a choice, of its type: 1 is not True, and a tensor is none of them."""
    return type(value) is type(choice) and bool(value == choice)


def check_heavy_ball(options: Mapping[str, Any]) -> None:
    """Refuse what says how the heavy ball rolls where there is none."""
    for key in ("nesterov", "dampening"):
        if options[key] and options["momentum"] == 0:
            raise ValueError(f"{key}: got {options[key]!r} with momentum 0; set momentum")


def check_alike(groups: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> None:
    """Refuse options of the last of ``groups`` that must be those of the first.

    Raises:
        ValueError: Naming the option and what both have.
    """
    for key in keys:
        if key in groups[-1] and groups[-1][key] != groups[0][key]:
            raise ValueError(f"{key}: got {groups[-1][key]!r} in one group and {groups[0][key]!r} "
                             "in another, wanted the same, as all groups are one step")  # fmt: skip


def _check_pairs(options: Mapping[str, Any]) -> None:
    """Options that are possible alone but not together."""
    size = options["block_size"]
    if options["merge"] == "paper" and not isinstance(size, int):
        raise ValueError(f"block_size: got {size!r}, wanted one number with merge='paper'")
    if options.get("match_rms") is not None and options["grafting"] is not None:
        raise ValueError(f"match_rms: got {options['match_rms']!r} with grafting="
                         f"{options['grafting']!r}, wanted one of the two; "
                         "set grafting=None")  # fmt: skip
    if diagonal_beta2(options) == 1 and _has_diagonal_average(options):
        raise ValueError("betas: got 1 for second moments, wanted below 1; set grafting_beta2, "
                         "or grafting='adagrad' and fallback=None")  # fmt: skip


def _has_diagonal_average(options: Mapping[str, Any]) -> bool:
    """Whether second moments are averaged anywhere: in SOAP, in grafting or in the fallback."""
    averages = options.get("grafting", "adam") in ("adam", "rmsprop")
    return averages or options["fallback"] is not None


def check_order(name: str, order: int, options: Mapping[str, Any]) -> None:
    """Refuse exponents that blocks of a parameter cannot have, or whose roots cannot be found.

    Args:
        name: Of the parameter.
        order: Dims of its blocks.
        options: Its parameter group.

    Raises:
        ValueError: Naming the parameter, what was got and what is wanted.
    """
    exponent = options.get("exponent")
    if isinstance(exponent, (tuple, list)) and len(exponent) < order:
        raise ValueError(f"{name}: exponent has {len(exponent)} numbers, "
                         f"wanted {order}, one for each dim")  # fmt: skip
    by_products = options.get("root_method") == "newton_schulz"
    if by_products and exponent is None and not halvings(1 / (2 * order)):
        raise ValueError(f"{name}: exponent is 1/{2 * order} of its {order} dims, wanted 1/2, 1/4, "
                         "1/8, ... with root_method='newton_schulz'; set root_method='auto', or "
                         "exponent")  # fmt: skip


def _check_exponents(options: Mapping[str, Any]) -> None:
    """Iterations made of products find roots of whole order, or of powers of two, only."""
    method, exponents = options.get("root_method"), options.get("exponent")
    if exponents is None:
        return
    for exponent in _listed(exponents):
        whole = not exponent or abs(round(1 / exponent) * exponent - 1) < 1e-9
        if method == "newton" and not whole:
            raise ValueError(f"exponent: got {exponent}, wanted 1 / a whole number with "
                             "root_method='newton'; set root_method='eigh'")  # fmt: skip
        if method == "newton_schulz" and exponent and not halvings(exponent):
            raise ValueError(f"exponent: got {exponent}, wanted 1/2, 1/4, 1/8, ... with "
                             "root_method='newton_schulz'; set root_method='eigh'")  # fmt: skip
