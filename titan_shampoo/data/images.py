"""Labelled images on disk: a folder per class, or a data set of the Hugging Face hub.

    cats/                              photos/train/cat/1.jpg        photos/cat/1.jpg
      data/train-00000.parquet         photos/val/cat/2.jpg          photos/dog/7.png

Left: a local copy of a hub data set. Middle: folders of classes below ``train`` and ``val`` (or
``validation``, ``valid``, ``test``). Right: classes alone, of which 5% can be held out for
validation, by a hash of the relative path. Classes are numbered in alphabetical order, as
torchvision does.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import datasets
from PIL import Image
from torch import Tensor

from titan_shampoo.data import DataError, UnreadableSampleError
from titan_shampoo.data.files import no_file, walk
from titan_shampoo.data.paths import missing_path
from titan_shampoo.data.sources import has_tables, is_held_out, load_hub_split

__all__ = ["ImageFiles", "TransformedImages", "open_images"]

Part = Literal["train", "validation"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_VALIDATION_FOLDERS = ("val", "validation", "valid", "test")
_HUB_VALIDATION_SPLITS = ("validation", "val", "test")


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """(image, label) pairs: an RGB image of any size, and the number of its class."""

    source: str
    """Name of the source in the configuration."""
    classes: list[str]
    labels: Sequence[int]
    """One per image."""
    name: Callable[[int], str]
    """Place of an image, for messages."""
    data: Callable[[int], Any]
    """Path or bytes of an image."""

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image, decoded, and its class.

        Raises:
            UnreadableSampleError: If the file is gone, cut short, or no image, or has no class.
        """
        try:
            return _decoded(self.data(index)), self._label(index)
        except Exception as error:  # Pillow's decoders raise all kinds of errors
            message = (str(error).splitlines() or [""])[0]
            raise UnreadableSampleError(
                f"{self.name(index)}: {type(error).__name__}: {message}"
            ) from error

    def _label(self, index: int) -> int:
        label = int(self.labels[index])
        if not 0 <= label < len(self.classes):  # hub data sets use -1 for unknown
            raise ValueError(f"class {label}, wanted one of {len(self.classes)} from 0 on")
        return label

    def shortage(self, num_needed: int) -> str:
        """Error message for a run that needs at least ``num_needed`` images."""
        return (
            f'training.dataset or validation.dataset = "{self.source}" has {len(self)} images '
            f"here, {num_needed} are needed for one global batch; lower local_batch_size"
        )


@dataclass(frozen=True, slots=True)
class TransformedImages:
    """(tensor, label) pairs of images under one fixed transform."""

    images: ImageFiles
    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The transformed image and its class."""
        image, label = self.images[index]
        return self.transform(image), label

    def shortage(self, num_needed: int) -> str:
        """Error message of the images."""
        return self.images.shortage(num_needed)


def open_images(
    source: str,
    *,
    part: Part,
    key: str,
    hold_out: bool = True,
    classes: Sequence[str] | None = None,
) -> ImageFiles:
    """The images of ``source``; none is decoded yet.

    Args:
        source: A folder, or a hub data set as "name", "name:config" or "name:config:split".
        part: Part to open, if the source has both.
        key: The TOML key that holds ``source``, for messages.
        hold_out: True to divide a folder without parts into 95% and 5%; False to return all of it
            for either part.
        classes: Classes of other images, whose numbers are used.

    Raises:
        DataError: If the source does not exist, has no labelled images, or has an unknown class.
    """
    problem = missing_path(source)
    if problem is None and Path(source).expanduser().is_file():
        problem = "is a file, a folder is needed"
    if problem is not None:
        raise DataError(f'{key} = "{source}": {problem}')
    folder = Path(source).expanduser()
    if folder.is_dir() and not _has_tables(folder):
        images = _folder_images(folder, source, part, key, hold_out)
    else:
        images = _hub_images(source, part, key)
    if not len(images):
        raise DataError(f'{key} = "{source}": has no images of the {part} part')
    return images if classes is None else _renumbered(images, list(classes), key)


@cache
def _has_tables(folder: Path) -> bool:
    """True if ``folder`` is a local copy of a hub data set; reads all names in it otherwise."""
    return has_tables(folder)


def _decoded(data: Any) -> Image.Image:  # noqa: ANN401 (a path or a file)
    """The image in RGB; transparent palettes and 16-bit greys included."""
    if isinstance(data, str) and (problem := no_file(Path(data))):  # a FIFO would block
        raise OSError(problem)
    with Image.open(data) as file:
        image: Image.Image = file
        if image.mode.startswith("I"):  # Pillow would keep the lowest 8 bits
            image = image.convert("I").point(lambda value: value / 256).convert("L")
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


def _folder_images(folder: Path, source: str, part: Part, key: str, hold_out: bool) -> ImageFiles:
    training = folder / "train"
    held_out = next((folder / n for n in _VALIDATION_FOLDERS if (folder / n).is_dir()), None)
    if not training.is_dir():
        root, is_split = folder, True
    elif part == "validation" and held_out is not None:
        root, is_split = held_out, False
    else:
        root, is_split = training, held_out is None
    found = _labelled_files(root)
    if not found:
        raise DataError(
            f'{key} = "{source}": no folder of images per class there, such as '
            f"{folder / 'train' / 'cat' / '1.jpg'}"
        )
    if is_split and hold_out:
        wanted = part == "validation"
        kept = [(file, name) for file, name in found if _is_held_out(file, folder) is wanted]
    else:
        kept = found
    classes = sorted({name for _, name in found})
    if root != held_out:
        _refuse_empty_classes(root, classes, f'{key} = "{source}"')
    number = {name: index for index, name in enumerate(classes)}
    files = [file for file, _ in kept]
    return ImageFiles(
        source, classes, [number[name] for _, name in kept], _Named(files), files.__getitem__
    )


def _refuse_empty_classes(root: Path, classes: list[str], where: str) -> None:
    """Refuse classes without images: they would be missing, and the later ones renumbered."""
    empty = sorted({folder.name for folder in _class_folders(root)} - set(classes))
    if empty:
        raise DataError(
            f'{where}: class "{empty[0]}" has no images in {root / empty[0]}; put some there or '
            "remove the folder"
        )


def _class_folders(root: Path) -> list[Path]:
    try:
        shown = [entry for entry in sorted(root.iterdir()) if entry.name[0] != "."]
        lost = [entry for entry in shown if entry.is_symlink() and not entry.exists()]
        folders = [entry for entry in shown if entry.is_dir()]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if lost:
        raise DataError(f"{lost[0]}: a link that leads nowhere, which may be a class; remove it")
    return folders


def _is_held_out(file: str, folder: Path) -> bool:
    return is_held_out(Path(file).relative_to(folder).as_posix())


@dataclass(frozen=True, slots=True)
class _Named:
    """Path of each file; picklable for worker processes."""

    files: list[str]

    def __call__(self, index: int) -> str:
        return self.files[index]


@cache
def _labelled_files(root: Path) -> list[tuple[str, str]]:
    """(file, class) pairs below ``root`` by path; the class is the folder right below it."""
    found = []
    for entry in _class_folders(root):
        for folder, names in walk(entry):
            found += [
                (f"{folder}/{name}", entry.name)
                for name in names
                if name.lower().endswith(_SUFFIXES)
            ]
    return found


@dataclass(frozen=True, slots=True)
class _HubBytes:
    """The encoded images of one column."""

    rows: Any
    column: str

    def __call__(self, index: int) -> Any:  # noqa: ANN401 (bytes in a file, or a path)
        image = self.rows[index][self.column]
        return io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]


@dataclass(frozen=True, slots=True)
class _HubName:
    source: str

    def __call__(self, index: int) -> str:
        return f"{self.source}: row {index}"


def _hub_images(source: str, part: Part, key: str) -> ImageFiles:
    """Images of a split with one column of images and one of class labels, under any names."""
    rows = _hub_split(source, part, key)
    image, label = _column(rows, datasets.Image), _column(rows, datasets.ClassLabel)
    if image is None or label is None:
        columns = ", ".join(f"{name} ({kind!r})" for name, kind in rows.features.items())
        raise DataError(
            f'{key} = "{source}": needs a column of images and one of class labels; has {columns}'
        )
    return ImageFiles(
        source,
        list(rows.features[label].names),
        rows.with_format("numpy")[label][:],
        _HubName(source),
        _HubBytes(
            rows.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image
        ),
    )


def _hub_split(source: str, part: Part, key: str) -> Any:  # noqa: ANN401 (datasets is untyped)
    # The split named for training holds no validation part: validation needs another one.
    if part == "train" or (source.count(":") == 2 and key == "validation.dataset"):
        return load_hub_split(source, key=key)
    name, config = (*source.split(":"), "")[:2]
    refusal: DataError | None = None
    for split in _HUB_VALIDATION_SPLITS:
        try:
            return load_hub_split(f"{name}:{config}:{split}", key=key)
        except DataError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _column(rows: Any, kind: type) -> str | None:  # noqa: ANN401 (datasets is untyped)
    return next((name for name, type_ in rows.features.items() if isinstance(type_, kind)), None)


def _renumbered(images: ImageFiles, classes: list[str], key: str) -> ImageFiles:
    """``images`` with labels numbered as in ``classes``."""
    unknown = [name for name in images.classes if name not in classes]
    if unknown:
        raise DataError(
            f'{key} = "{images.source}": class "{unknown[0]}" is not among the '
            f"{len(classes)} of training.dataset"
        )
    number = [classes.index(name) for name in images.classes]
    labels = [number[label] for label in images.labels]
    return ImageFiles(images.source, classes, labels, images.name, images.data)
