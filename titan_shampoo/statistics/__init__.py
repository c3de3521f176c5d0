"""What curvature methods measure in a layer: sums over its inputs and output gradients.

`tap` attaches to a model what measures; a `TappedLayer` holds what was measured.
"""

from titan_shampoo.statistics.checks import (
    SPLIT_BACKWARD_SCHEDULES,
    check_counts,
    check_schedule,
    untapped,
)
from titan_shampoo.statistics.layers import TappedLayer, TappedStack, tap, untap
from titan_shampoo.statistics.sharding import LayerSharding, reshard

__all__ = [
    "SPLIT_BACKWARD_SCHEDULES",
    "LayerSharding",
    "TappedLayer",
    "TappedStack",
    "check_counts",
    "check_schedule",
    "reshard",
    "tap",
    "untap",
    "untapped",
]
