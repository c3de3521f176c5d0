"""Parts of the image recipe: data, loss, and the model's settings that follow from the data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.loss import IGNORE_INDEX, LossFunction
from torchtitan.config import JobConfig

from titan_shampoo.data import DataError
from titan_shampoo.data.digits import DIGITS_SIZE, Digits
from titan_shampoo.data.images import ImageFiles, TransformedImages, open_images
from titan_shampoo.data.loader import PositionedLoader
from titan_shampoo.data.mixup import MixedLabels, swapped
from titan_shampoo.data.paths import ALL_DIGITS, DEFAULT_IMAGE_SIZE
from titan_shampoo.data.transforms import (
    CentreView,
    Chain,
    RandomErasing,
    RandomShift,
    RandomView,
    RandomWarp,
)
from titan_shampoo.models.resnet import ResNetArgs, flops_per_image, num_parameters
from titan_shampoo.titan.loaders import evaluation_loader, training_loader
from titan_shampoo.titan.validation import Validator

_TRAINING = "training.dataset"


@dataclass
class ImageModelArgs:
    """A residual network in the form of torchtitan's model arguments."""

    network: ResNetArgs
    image_size: int = 224

    def update_from_config(self, job_config: JobConfig, **_: object) -> None:
        """Set the number of classes and the image size from the data."""
        wanted = job_config.images.num_classes
        self.network.num_classes = wanted or len(_classes(job_config))
        self.network.channels_last = job_config.images.channels_last
        self.image_size = _size(job_config)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return the number of parameters and the operations per image, forward and backward."""
        return num_parameters(model), flops_per_image(self.network, self.image_size)


def image_loader(
    *, dp_world_size: int, dp_rank: int, tokenizer: None, job_config: JobConfig
) -> PositionedLoader:
    """Return the loader of augmented training images."""
    source, images = job_config.training.dataset, job_config.images
    if images.num_classes is not None and images.num_classes != len(_classes(job_config)):
        raise DataError(
            f'images.num_classes = {images.num_classes}: training.dataset = "{source}" has '
            f"{len(_classes(job_config))} classes; set it to that, or remove it"
        )
    load = partial(
        training_loader,
        job_config=job_config,
        dp_world_size=dp_world_size,
        dp_rank=dp_rank,
        mixup=images.mixup,
    )
    finish = Chain(
        [
            RandomWarp(images.rotate, images.stretch),
            RandomShift(images.shift),
            RandomErasing(images.random_erasing),
        ]
    )
    if source in ALL_DIGITS:
        return load(Digits(source=source, size=_size(job_config)), augment=finish)
    view = RandomView(
        _size(job_config), images.min_area, images.flip, finish, images.mean, images.std
    )
    return load(_training_images(job_config), augment=view)


def image_validator(
    *,
    job_config: JobConfig,
    tokenizer: None,
    dp_world_size: int,
    dp_rank: int,
    loss_fn: LossFunction,
    **trainer: Any,  # noqa: ANN401 (what torchtitan's trainer hands to a validator)
) -> Validator:
    """Return the validator on the centres of the validation images, by plain cross entropy.

    Files are ordered by class, so ``validation.steps`` batches take the same share of each class.
    """
    images = _validation_images(job_config)
    loader = evaluation_loader(images, job_config, dp_world_size, dp_rank, spread=True)
    return Validator(
        loader, job_config=job_config, reports="accuracy", loss_fn=class_loss, **trainer
    )


def build_class_loss(job_config: JobConfig, **_: object) -> LossFunction:
    """Return the cross entropy of class scores with smoothed labels, summed over the images."""
    loss = partial(class_loss, label_smoothing=job_config.images.label_smoothing)
    compiled = job_config.compile.enable and "loss" in job_config.compile.components
    return torch.compile(loss, backend=job_config.compile.backend) if compiled else loss


def class_loss(
    scores: Tensor, labels: Tensor | MixedLabels, *, label_smoothing: float = 0.0
) -> Tensor:
    """Return the cross entropy, summed over the images.

    Args:
        scores: ``(n, num_classes)``.
        labels: Classes ``(n,)``, of single images or of mixed pairs.
        label_smoothing: Share of each label that is spread over all classes.
    """
    entropy: Callable[..., Tensor] = partial(
        nn.functional.cross_entropy,
        scores.float(),
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
    )
    if not isinstance(labels, MixedLabels):
        return entropy(labels, reduction="sum")
    own, others = labels.labels, swapped(labels.labels)
    parts = (entropy(own, reduction="none"), entropy(others, reduction="none"))
    return (labels.weight * parts[0] + (1 - labels.weight) * parts[1]).sum()


def _validation_images(job_config: JobConfig) -> Digits | TransformedImages:
    own, images = job_config.validation.dataset, job_config.images
    source = own or job_config.training.dataset
    if source in ALL_DIGITS:
        return Digits(source=source, part="validation", size=_size(job_config))
    files = open_images(
        source,
        part="validation",
        key="validation.dataset" if own else _TRAINING,
        hold_out=not own,
        classes=_classes(job_config),
    )
    size = _size(job_config)
    view = CentreView(size, images.resize or round(size * 8 / 7), images.mean, images.std)
    return TransformedImages(files, view)


def _size(job_config: JobConfig) -> int:
    """Return the edge of the network's input images."""
    is_small = job_config.training.dataset in ALL_DIGITS
    return job_config.images.size or (DIGITS_SIZE if is_small else DEFAULT_IMAGE_SIZE)


def _classes(job_config: JobConfig) -> list[str]:
    source = job_config.training.dataset
    if source in ALL_DIGITS:
        return Digits(part="validation").classes
    return _training_images(job_config).classes


def _training_images(job_config: JobConfig) -> ImageFiles:
    """Return the images to train on: all of them, if ``validation.dataset`` names others."""
    return open_images(
        job_config.training.dataset,
        part="train",
        key=_TRAINING,
        hold_out=not job_config.validation.dataset,
    )
