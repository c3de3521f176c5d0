"""Images of any size to tensors of one size: random views for training, the centre for evaluation.

As in He et al. 2016 and Szegedy et al. 2015: a crop of random area and shape, resized, and mirrored
half of the time. For evaluation, the shorter edge is resized and the centre taken. All draws come
from the generator argument.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

__all__ = ["CentreView", "Chain", "RandomErasing", "RandomShift", "RandomView", "RandomWarp"]

Box = tuple[float, float, float, float]

_LOG_RATIO = math.log(4 / 3)
"""Crops are at most 4:3 and at least 3:4."""

_TRIES = 10
_ERASED_AREA = (0.02, 1 / 3)
_LOG_ERASED_RATIO = math.log(10 / 3)


@dataclass(frozen=True, slots=True)
class RandomErasing:
    """Sets a random rectangle of normalised pixels to their mean, 0 (Zhong et al. 2020)."""

    probability: float
    """Share of the images that lose a rectangle."""

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """``pixels``, ``(3, h, w)``, without a rectangle of 2% to 33% of the area, or unchanged."""
        if _uniform(generator) >= self.probability:
            return pixels
        height, width = pixels.shape[1:]
        for _ in range(_TRIES):
            area = _uniform(generator, *_ERASED_AREA) * height * width
            ratio = math.exp(_uniform(generator, -_LOG_ERASED_RATIO, _LOG_ERASED_RATIO))
            rows, cols = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < rows < height and 0 < cols < width:
                top = int(_uniform(generator, 0, height - rows + 1))
                left = int(_uniform(generator, 0, width - cols + 1))
                erased = pixels.clone()
                erased[:, top : top + rows, left : left + cols] = 0
                return erased
        return pixels


@dataclass(frozen=True, slots=True)
class RandomWarp:
    """Rotates, stretches and shears pixels about the centre, and repeats the edge outside.

    For handwriting: every writer has a slant and proportions (Simard et al. 2003).
    """

    degrees: float
    """Largest angle in either direction, at least zero."""
    stretch: float
    """Axes are scaled by ``exp(u)`` and sheared by ``u``, with ``u`` in ``[-stretch, stretch]``."""

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """``pixels``, ``(3, h, w)``, warped."""
        if not self.degrees and not self.stretch:
            return pixels
        angle = math.radians(_uniform(generator, -self.degrees, self.degrees))
        wide, high, shear = (_uniform(generator, -self.stretch, self.stretch) for _ in range(3))
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)],
                             [math.sin(angle), math.cos(angle)]])  # fmt: skip
        form = torch.tensor([[math.exp(wide), shear], [0.0, math.exp(high)]])
        places = nn.functional.affine_grid(
            torch.cat([turn @ form, torch.zeros(2, 1)], 1)[None], [1, *pixels.shape],
            align_corners=False,
        )  # fmt: skip
        return nn.functional.grid_sample(
            pixels[None], places, padding_mode="border", align_corners=False
        )[0]


@dataclass(frozen=True, slots=True)
class RandomShift:
    """Moves pixels by a random number of rows and columns, and repeats the edge outside."""

    most: int
    """Largest distance in pixels in either direction, at least zero."""

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """``pixels``, ``(3, h, w)``, moved."""
        if not self.most:
            return pixels
        height, width = pixels.shape[1:]
        padded = nn.functional.pad(pixels[None], [self.most] * 4, mode="replicate")[0]
        places = 2 * self.most + 1
        top, left = int(_uniform(generator, 0, places)), int(_uniform(generator, 0, places))
        return padded[:, top : top + height, left : left + width]


@dataclass(frozen=True, slots=True)
class Chain:
    """One random change of pixels after another."""

    parts: Sequence[RandomWarp | RandomShift | RandomErasing]

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """``pixels``, ``(3, h, w)``, changed by all parts in order."""
        for part in self.parts:
            pixels = part(pixels, generator)
        return pixels


@dataclass(frozen=True, slots=True)
class RandomView:
    """A random crop, mirrored or not, normalised: float ``(3, size, size)``."""

    size: int
    """Edge of the result in pixels."""
    min_area: float
    """Smallest area of a crop, relative to the image's, greater than 0 and at most 1."""
    flip: float
    """Probability of the mirror image."""
    finish: Chain
    """Changes of the pixels at the end."""
    mean: Sequence[float]
    """Mean of red, green and blue, from 0 to 1."""
    std: Sequence[float]
    """Standard deviation of red, green and blue, greater than 0."""

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """One view of ``image``, in RGB; equal for equal states of ``generator``."""
        box = _random_box(image.width, image.height, self.min_area, generator)
        view = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if _uniform(generator) < self.flip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.finish(_normalised(view, self.mean, self.std), generator)


@dataclass(frozen=True, slots=True)
class CentreView:
    """The centre of an image whose shorter edge was resized: float ``(3, size, size)``."""

    size: int
    """Edge of the result in pixels."""
    resize: int
    """The shorter edge before the centre is taken, at least ``size``."""
    mean: Sequence[float]
    """As in ``RandomView``."""
    std: Sequence[float]
    """As in ``RandomView``."""

    def __call__(self, image: Image.Image) -> Tensor:
        """The view of ``image``, in RGB."""
        shorter = min(image.width, image.height)
        edge = shorter * self.size / self.resize
        left, top = (image.width - edge) / 2, (image.height - edge) / 2
        box = (left, top, left + edge, top + edge)
        view = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        return _normalised(view, self.mean, self.std)


def _random_box(width: int, height: int, min_area: float, generator: torch.Generator) -> Box:
    """A crop of random area and shape, or the largest centred one within the limits of shape."""
    for _ in range(_TRIES):
        area = _uniform(generator, min_area, 1) * width * height
        ratio = math.exp(_uniform(generator, -_LOG_RATIO, _LOG_RATIO))
        cols, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < cols <= width and 0 < rows <= height:
            left = int(_uniform(generator, 0, width - cols + 1))
            top = int(_uniform(generator, 0, height - rows + 1))
            return left, top, left + cols, top + rows
    longest = math.exp(_LOG_RATIO)
    cols, rows = min(width, round(height * longest)), min(height, round(width * longest))
    left, top = (width - cols) // 2, (height - rows) // 2
    return left, top, left + cols, top + rows


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The pixels of an RGB image, ``(3, h, w)``, with ``mean`` 0 and ``std`` 1."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
