"""Labelled images in memory: scikit-learn's handwritten digits, which need no download.

1,797 images of 8x8 pixels, enlarged in three equal channels, so that any ResNet takes them. The
last 20% in file order are the validation part. Settings that are chosen on it leave no test part;
"digits_tuning" therefore leaves it out and holds out the first 40% of the rest. (Writers follow
each other, and some are easy: any method reads the last 20% of the rest to 99.65%.)
"""

from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

from titan_shampoo.data.paths import DIGITS, DIGITS_TUNING

__all__ = ["DIGITS_SIZE", "Digits"]

DIGITS_SIZE = 32


class Digits:
    """(image, label) pairs: float ``(3, size, size)`` and the class.

    Mean 0 and variance 1 over the training part.
    """

    classes: list[str]

    def __init__(
        self,
        *,
        source: str = DIGITS,
        part: Literal["train", "validation"] = "train",
        size: int = DIGITS_SIZE,
    ) -> None:
        """Load one part.

        Args:
            source: "digits", or "digits_tuning" without its test part.
            part: The training or the held-out part.
            size: Edge in pixels to which the images are enlarged.
        """
        digits = load_digits()
        order = torch.arange(len(digits.target))
        kept, held_out = order.split([len(order) - len(order) // 5, len(order) // 5])
        if source == DIGITS_TUNING:
            held_out, kept = kept.tensor_split([len(kept) * 2 // 5])
        pixels = torch.from_numpy(digits.images).float().unsqueeze(1)
        images = interpolate(pixels, (size, size), mode="bilinear")  # (num_images, 1, size, size)
        variance, mean = torch.var_mean(images[kept], correction=0)
        rows = kept if part == "train" else held_out
        self._images = (images[rows] - mean) / variance.sqrt()
        self._labels: list[int] = digits.target[rows.numpy()].tolist()
        self._source = source
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        """The number of images."""
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image ``(3, size, size)`` and class."""
        return self._images[index].expand(3, -1, -1), self._labels[index]

    def shortage(self, num_needed: int) -> str:
        """Error message for a run that needs at least ``num_needed`` images."""
        return (
            f'training.dataset = "{self._source}" has {len(self)} images here, {num_needed} are '
            "needed for one global batch; lower training.local_batch_size"
        )
