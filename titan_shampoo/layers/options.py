"""Which values the options of a parameter group of Eva and its relatives may have.

Every rank has the same options, so every rank refuses the same ones, before any collective.
"""

from collections.abc import Mapping
from typing import Any

from titan_shampoo.options import CHOICES as SHARED_CHOICES
from titan_shampoo.options import LIMITS as SHARED_LIMITS
from titan_shampoo.options import (
    NOT_NEGATIVE,
    OPEN,
    POSITIVE,
    STEPS,
    SWITCH,
    Limit,
    check_alone,
    check_heavy_ball,
    is_count,
    number,
    pair,
)

_POSITIVE_OR_NONE: Limit = (lambda x: x is None or POSITIVE[0](x), f"None or {POSITIVE[1]}")

_LIMITS: dict[str, Limit] = {
    **{key: SHARED_LIMITS[key] for key in (
        "lr", "peak_lr", "max_lr", "weight_decay", "momentum", "dampening", "max_skipped",
        "max_failures", "factor_frequency", "precondition_frequency")},
    "betas": (pair(lambda x: 0 <= x < 1, lambda x: 0 <= x < 1), "two numbers in [0, 1)"),
    "eps": POSITIVE,
    "damping": POSITIVE,
    "statistics_decay": OPEN,
    "kl_clip": (number(lambda x: x > 0), "a number greater than 0"),
    "loss_normaliser": _POSITIVE_OR_NONE,
    "kv_batch_size": _POSITIVE_OR_NONE,
    "fallback_lr": (lambda x: x is None or NOT_NEGATIVE[0](x), f"None or {NOT_NEGATIVE[1]}"),
    "max_factor_dim": (lambda x: x is None or is_count(x), f"None or {STEPS[1]}"),
}  # fmt: skip

_CHOICES: dict[str, tuple[Any, ...]] = {
    "weight_decay_type": SHARED_CHOICES["weight_decay_type"],
    "damping_mode": ("absolute", "relative"),
    "kv_scale": ("per_token", "batch_mean"),
    "scaling": ("kl_clip", "norm", "kl_norm", None),
    "bias": ("joint", "separate"),
    "merge": ("matrix", "none"),
    "batch_dims": (0, 1),
    "refresh": SHARED_CHOICES["refresh"],
    "fallback": ("adamw", "sgd"),
    "precondition": SHARED_CHOICES["precondition"],
    "factored_damping": SWITCH,
    "nesterov": SWITCH,
}

OF_THE_WHOLE_STEP = ("scaling", "kl_clip", "max_skipped", "max_failures")
"""Options that all groups share: one number is formed of all layers, and steps are counted once."""


def check_layer_options(options: Mapping[str, Any]) -> None:
    """Refuse what is impossible in a parameter group.

    Raises:
        ValueError: Naming the option, what was got and what is wanted.
    """
    check_alone(options, _LIMITS, _CHOICES)
    check_heavy_ball(options)
    _check_pairs(options)


def _check_pairs(options: Mapping[str, Any]) -> None:
    """Options that are possible alone but not together."""
    if options.get("batch_dims") and "factor_frequency" in options:
        raise ValueError(f"batch_dims: got 1, wanted 0: {options['method']} takes no stacks of "
                         "matrices one by one; give them to Eva, EvaF or EvaS")  # fmt: skip
    if options["scaling"] == "kl_norm" and "factor_frequency" in options:
        raise ValueError(f"scaling: got 'kl_norm', wanted 'kl_clip', 'norm' or None with "
                         f"{options['method']}: it makes up for a division by the damping, which "
                         "only Eva, EvaF and EvaS make")  # fmt: skip
    if options.get("kv_scale") == "batch_mean" and options["kv_batch_size"] is None:
        raise ValueError("kv_batch_size: got None with kv_scale='batch_mean', wanted the batch "
                         "size that the damping was tuned for")  # fmt: skip
