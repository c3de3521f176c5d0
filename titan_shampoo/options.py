"""Which values the options of a parameter group may have.

Every rank has the same options, so every rank refuses the same ones, before any collective.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from titan_shampoo.functional.grafting import diagonal_beta2
from titan_shampoo.functional.roots import halvings


def _listed(value: Any) -> Sequence[Any]:  # noqa: ANN401 - one number or several
    return value if isinstance(value, (tuple, list)) else (value,)


Limit = tuple[Callable[[Any], bool], str]

_OPEN: Limit = (lambda x: 0 <= x < 1, "in [0, 1)")
_HALF: Limit = (lambda x: x is None or 0 < x <= 1, "in (0, 1]")
_POSITIVE: Limit = (lambda x: x > 0, "greater than 0")
_STEPS: Limit = (lambda x: x is None or (isinstance(x, int) and x >= 1), "at least 1")

LIMITS: dict[str, Limit] = {
    "lr": (lambda x: x >= 0, "at least 0"),
    "betas": (lambda x: 0 <= x[0] < 1 and 0 < x[1] <= 1, "[0, 1) and (0, 1]"),
    "eps": _POSITIVE,
    "eps_relative": _HALF,
    "beta3": (lambda x: x is None or 0 <= x < 1, "in [0, 1)"),
    "weight_decay": (lambda x: x >= 0, "at least 0"),
    "momentum": _OPEN,
    "dampening": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "block_size": (
        lambda x: min(_listed(x)) >= 1 and (isinstance(x, int) or len(x) == 2),
        "positive, one or one for rows and one for columns",
    ),
    "precondition_frequency": _STEPS,
    "start_step": _STEPS,
    "factor_frequency": _STEPS,
    "max_failures": _STEPS,
    "max_skipped": _STEPS,
    "grafting_beta2": _HALF,
    "grafting_eps": _POSITIVE,
    "compile": (lambda x: isinstance(x, bool), "True or False"),
    "match_rms": (lambda x: x is None or x > 0, "greater than 0"),
    "exponent": (
        lambda x: x is None or min(_listed(x)) >= 0,
        "at least 0, one or one per dim",
    ),
}

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
            raise ValueError(f"{key}: got {options[key]!r}, wanted {wanted}")
    for key, some in choices.items():
        if key in options and options[key] not in some:
            raise ValueError(f"{key}: got {options[key]!r}, wanted one of {some}")


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
