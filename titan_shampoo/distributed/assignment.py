"""Who works on which block, and when its turn to refresh comes.

Both are longest-first packings of costs into bins: every rank computes them from the same numbers
and gets the same answer, so nothing has to be agreed on.
"""

from collections.abc import Sequence


def refresh_turns(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Turn in ``[0, len(loads))`` of each block, such that every turn costs about the same.

    Args:
        costs: Cost of one refresh of each block.
        loads: What each turn of the period costs already; added to.
    """
    period = len(loads)
    turns = [0] * len(costs)
    for block in _longest_first(costs):
        turn = min(range(period), key=loads.__getitem__)
        turns[block] = turn
        loads[turn] += costs[block]
    return turns


def assign_owners(
    costs: Sequence[float], candidates: Sequence[Sequence[int]], num_ranks: int
) -> list[int]:
    """Rank in ``candidates[block]`` that works on each block, such that the largest load is small.

    With equal candidates no rank carries more than the mean plus one block.

    Args:
        costs: Cost of each block per step, refreshes included at their rate.
        candidates: Ranks that may own the block, at least one.
        num_ranks: Number of ranks.
    """
    loads = [0.0] * num_ranks
    owners = [0] * len(costs)
    for block in _longest_first(costs):
        owner = min(candidates[block], key=loads.__getitem__)
        owners[block] = owner
        loads[owner] += costs[block]
    return owners


def _longest_first(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda block: (-costs[block], block))
