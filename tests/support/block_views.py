"""State of single blocks, out of the stacks that an optimizer keeps."""

from collections.abc import Mapping

from torch import Tensor


def of_blocks(state: Mapping[str, Tensor], name: str) -> dict[int, Tensor]:
    """Views of one kind of state by the number of the block, of the blocks that a rank owns."""
    views = [row for key, stack in state.items() if key.startswith(f"{name}.") for row in stack]
    return dict(zip(state["blocks"].tolist(), views, strict=True))
