"""What curvature methods measure in a layer: sums over its inputs and output gradients.

`tap` attaches to a model what measures; a `TappedLayer` holds what was measured.
"""

from titan_shampoo.statistics.layers import TappedLayer, check_counts, tap
from titan_shampoo.statistics.sharding import LayerSharding

__all__ = ["LayerSharding", "TappedLayer", "check_counts", "tap"]
