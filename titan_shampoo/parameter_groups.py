"""Parameter groups between steps: users, schedulers and frameworks change them as they like.

What is misspelt is refused when a group is given. What is set or replaced later is compared with
what the optimizer was made for before each step, so that nothing raises once something has moved.
"""

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from titan_shampoo.options import LIMITS, shown

logger = logging.getLogger(__name__)

Group = dict[str, Any]

_KEYS_OF_OTHERS = frozenset(
    (
        "params", "param_names", "peak_lr",  # torch's, and one that is always there
        "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr",  # schedulers
        "name", "group_name", "lr_scale",  # Lightning, timm
    )
)  # fmt: skip
"""Keys that a group may have beside options: those that torch and other libraries read."""

SWITCHES_OF_TORCH = {
    "maximize": "negate the loss",
    "amsgrad": "no method has it",
    "differentiable": "no step can be differentiated",
    "capturable": "no step reads it",
    "foreach": "every step has one implementation",
    "fused": "every step has one implementation",
}
"""Switches of torch's optimizers that may be off, and what to do instead of setting them."""

MAX_IDLE = 3
"""Steps in a row without a gradient after which it is said."""


def check_keys(group: Mapping[str, Any], method: str, options: Iterable[str]) -> None:
    """Refuse keys of a parameter group that nobody would read.

    Args:
        group: As it was given.
        method: Its name.
        options: Names of the options that it has.

    Raises:
        ValueError: Naming the key, and the option that is nearest to it.
    """
    known = set(options)
    for key, value in group.items():
        if key in SWITCHES_OF_TORCH:
            if value is not None and value is not False:
                raise ValueError(f"{key}: got {shown(value)}, wanted False or None: "
                                 f"{SWITCHES_OF_TORCH[key]}")  # fmt: skip
        elif key not in known and key not in _KEYS_OF_OTHERS:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "keys of your own can be set later"
            raise ValueError(f"{key}: {method} has no such option in a parameter group; {hint}")


def check_complete(group: Mapping[str, Any], options: Iterable[str]) -> None:
    """Refuse a group that an option was taken out of.

    Raises:
        ValueError: Naming it.
    """
    for key in options:
        if key not in group:
            raise ValueError(f"{key}: was taken out of a parameter group; put it back")


class AsMade:
    """Parameters and options that an optimizer's plan and state were made for.

    Args:
        groups: Parameter groups.
        named: All parameters with their names, group by group.
        fixed: Options that plan and state follow from.
    """

    def __init__(
        self, groups: Sequence[Group], named: Iterable[tuple[str, Tensor]], fixed: Iterable[str]
    ) -> None:
        self._params = [(name, param, param.dtype, param.device) for name, param in named]
        self._groups = list(groups)
        self.names = [name for name, *_ in self._params]
        self.params = {param for _, param, *_ in self._params}
        self.has_matrices = any(param.dim() > 1 for param in self.params)
        self._fixed = tuple(fixed)
        self.learn(groups)

    def learn(self, groups: Sequence[Group]) -> None:
        """Take the options that ``groups`` have now for those that plan and state follow from."""
        self._made = [{key: group[key] for key in self._fixed if key in group} for group in groups]
        self._seen: list[Group] = [{} for _ in groups]

    def has_others(self, groups: Sequence[Group]) -> bool:
        """Whether ``groups`` are others, or have other parameters."""
        if len(groups) != len(self._groups):
            return True
        if any(group is not made for group, made in zip(groups, self._groups, strict=True)):
            return True
        params = [param for group in groups for param in group["params"]]
        if len(params) != len(self._params):
            return True
        pairs = zip(params, self._params, strict=True)
        return any(param is not made[1] for param, made in pairs)

    def check_tensors(self) -> None:
        """Refuse parameters that were cast or moved.

        Raises:
            RuntimeError: Naming the first of them.
        """
        for name, param, dtype, device in self._params:
            if param.dtype is not dtype or param.device != device:
                raise RuntimeError(f"{name}: is {param.dtype} on {param.device}, was {dtype} on "
                                   f"{device} when the optimizer was made; make it after .to(), "
                                   ".double() and the like")  # fmt: skip

    def changed(self, groups: Sequence[Group], options: Iterable[str]) -> list[Group]:
        """The groups in which an option was set since :meth:`accept`; ``lr`` aside.

        By identity: schedulers set new objects. What is inside a list can be set without one.

        Args:
            groups: As many as there were.
            options: Names of all options.
        """
        keys = [key for key in options if key != "lr"]
        return [
            group
            for group, seen in zip(groups, self._seen, strict=True)
            if any(
                key not in group
                or key not in seen
                or group[key] is not seen[key]
                or type(seen[key]) is list
                for key in keys
            )
        ]

    def accept(self, groups: Sequence[Group]) -> None:
        """Remember the options of ``groups``, which have been checked."""
        self._seen = [dict(group) for group in groups]

    def check_fixed(self, groups: Sequence[Group]) -> None:
        """Refuse options that were set too late.

        Raises:
            ValueError: Naming the first of them.
        """
        for group, made in zip(groups, self._made, strict=True):
            for key, value in made.items():
                if group[key] != value:
                    raise ValueError(f"{key}: got {shown(group[key])} in an optimizer that was "
                                     f"made with {value!r}; make another one")  # fmt: skip


def check_rates(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse impossible learning rates, which may be tensors that are changed in place.

    Raises:
        ValueError: Naming what is wrong.
    """
    for group in groups:
        check_complete(group, ("lr", "peak_lr"))
        for key in ("lr", "peak_lr", "max_lr"):
            holds, wanted = LIMITS[key]
            if key in group and not holds(group[key]):
                raise ValueError(f"{key}: got {shown(group[key])}, wanted {wanted}")


class Peaks:
    """Largest learning rates: what a group was made with is not always one of its schedule.

    A schedule that rises above it raises ``peak_lr``. One that stays far below it is reported: the
    optimizer cannot know whether the rates to come are larger.
    """

    def __init__(self) -> None:
        self._before: dict[int, float] = {}
        self._highest: dict[int, float] = {}
        self._has_risen: set[int] = set()
        self._is_told = False

    def follow(self, groups: Sequence[Group], depends: Callable[[Group], bool]) -> None:
        """Take note of the rates of a step.

        Args:
            groups: Parameter groups.
            depends: Whether anything in a group depends on the largest rate.
        """
        for number, group in enumerate(groups):
            rate = float(group["lr"])
            if rate > float(group["peak_lr"]):
                group["peak_lr"] = rate
            before = self._before.get(number, rate)
            self._before[number] = rate
            self._highest[number] = max(rate, self._highest.get(number, 0.0))
            if rate > before:
                self._has_risen.add(number)
            elif rate < before and number in self._has_risen and "max_lr" not in group:
                self._tell_if_far_below(number, group, depends)

    def _tell_if_far_below(
        self, number: int, group: Group, depends: Callable[[Group], bool]
    ) -> None:
        highest, peak = self._highest[number], float(group["peak_lr"])
        if not self._is_told and highest < peak / 10 and depends(group):
            self._is_told = True
            logger.warning(
                "lr has risen to %.3g and falls again, but peak_lr is %.3g, and the rate of the "
                "fallback or the weight decay follows lr / peak_lr: set "
                "optimizer.param_groups[%d]['peak_lr'] = %.3g before training",
                highest, peak, number, highest,
            )  # fmt: skip


class Idleness:
    """Counts steps in a row in which no parameter had a gradient on any rank, and says so once."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._is_told = False

    def count(self, num_gradients: int, names: Sequence[str]) -> None:
        """Count a step.

        Args:
            num_gradients: Parameters with a gradient on any rank that holds them.
            names: Of all parameters.
        """
        self._in_a_row = 0 if num_gradients or not names else self._in_a_row + 1
        if self._in_a_row < MAX_IDLE or self._is_told:
            return
        self._is_told = True
        logger.warning(
            "no parameter of the optimizer (%s%s) had a gradient in %d steps in a row: nothing is "
            "trained. fully_shard, to_empty and load_state_dict(assign=True) replace the "
            "parameters of a model: make the optimizer after them, of model.named_parameters(), "
            "and call backward() before step()",
            names[0], f" and {len(names) - 1} more" if len(names) > 1 else "", MAX_IDLE,
        )  # fmt: skip
