"""The flags that ask what a run will need instead of starting it: ``--plan --world-size N --json``.

They are no settings: a run has none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from titan_shampoo.config.errors import ConfigError
from titan_shampoo.config.values import whole_number

MOST_RANKS = 2**16
"""What has been planned; each rank takes some milliseconds."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What was asked."""

    world_size: int
    """Number of ranks of the run."""
    as_json: bool
    """For programs and not for people."""


def read_plan_request(
    args: Sequence[str], started_ranks: int
) -> tuple[PlanRequest | None, list[str]]:
    """What ``--plan`` asks for, None without it; and the rest of the command line.

    Args:
        args: The command line without the program's name.
        started_ranks: Number of ranks to plan for without ``--world-size``.

    Raises:
        ConfigError: If its companions stand without it, or the number of ranks is none.
    """
    wanted, as_json = False, False
    world_size: str | None = None
    rest: list[str] = []
    remaining = list(args)
    while remaining:
        name, equals, value = remaining.pop(0).partition("=")
        flag = name.replace("_", "-")
        if flag == "--plan" and not equals:
            wanted = True
        elif flag == "--json" and not equals:
            as_json = True
        elif flag == "--world-size":
            world_size = value if equals else "".join(remaining[:1])
            remaining = remaining if equals else remaining[1:]
        else:
            rest.append(name + equals + value)
    if not wanted and (as_json or world_size is not None):
        flag = "--json" if as_json else "--world-size"
        raise ConfigError(f"command line: {flag}: belongs to --plan; add --plan, or remove it")
    if not wanted:
        return None, rest
    return PlanRequest(_positive(world_size, started_ranks), as_json), rest


def _positive(text: str | None, otherwise: int) -> int:
    if text is None:
        return otherwise
    number = whole_number(text)
    if number is None or not 1 <= number <= MOST_RANKS:
        wanted = f"expected a number of ranks from 1 to {MOST_RANKS}, the most that are planned"
        raise ConfigError(f"command line: --world-size: got {text!r}, {wanted}")
    return number
