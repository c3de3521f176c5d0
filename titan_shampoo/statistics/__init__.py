"""Statistics of a layer for curvature methods: sums over its inputs and output gradients.

`tap` attaches the measurement to a model; a `TappedLayer` holds the sums of one layer.
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
