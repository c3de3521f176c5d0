"""Promises of images on disk: found, decoded, seen at random but the same on all meshes."""

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from titan_shampoo.data import DataError, UnreadableSampleError, sources
from titan_shampoo.data.images import TransformedImages, open_images
from titan_shampoo.data.loader import EvaluationLoader, PositionedLoader
from titan_shampoo.data.mixup import mix_pairs, pair_weights
from titan_shampoo.data.transforms import (
    CentreView,
    Chain,
    RandomErasing,
    RandomShift,
    RandomView,
    RandomWarp,
)

KEY = "training.dataset"
PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def picture(seed=0, size=(40, 30), mode="RGB"):
    values = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def folder(tmp_path):
    """20 images of two classes to train on, four to validate, of mixed sizes and formats."""
    for index in range(20):
        name, suffix = ("cat", "JPEG") if index % 2 else ("dog", "png")
        write(tmp_path / f"train/{name}/{index}.{suffix}", picture(index, (20 + index, 33)))
    for index in range(4):
        write(tmp_path / f"val/{('cat', 'dog')[index % 2]}/{index}.jpg", picture(100 + index))
    (tmp_path / "train/.hidden").mkdir()
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    return tmp_path


def random_view(**changes):
    return RandomView(**({"size": 16, "min_area": 0.1, "flip": 0.5, **PLAIN} | changes))


def view_of(image, seed=0, **changes):
    changes.setdefault("finish", Chain([]))
    return random_view(**changes)(image, torch.Generator().manual_seed(seed))


def test_folders_are_classes_in_alphabetical_order(folder):
    train = open_images(str(folder), part="train", key=KEY)
    held_out = open_images(str(folder), part="validation", key=KEY, classes=train.classes)
    assert (train.classes, len(train), len(held_out)) == (["cat", "dog"], 20, 4)
    image, label = train[0]
    assert (image.mode, image.height, label) == ("RGB", 33, 0)
    assert [held_out[index][1] for index in range(4)] == [0, 0, 1, 1]


def test_a_folder_without_parts_is_split_by_name_and_nothing_lies_in_both(tmp_path):
    for index in range(60):
        write(tmp_path / f"{'ab'[index % 2]}/{index}.png", picture(index, (4, 4)))
    train, held_out = (
        open_images(str(tmp_path), part=part, key=KEY) for part in ("train", "validation")
    )
    names = [{images.name(i) for i in range(len(images))} for images in (train, held_out)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 60
    assert 0 < len(names[1]) < 15
    for part in ("train", "validation"):
        assert len(open_images(str(tmp_path), part=part, key=KEY, hold_out=False)) == 60


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA", "I;16"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    path = tmp_path / f"a/x.{'jpg' if mode == 'CMYK' else 'png'}"
    if mode == "I;16":
        grey = np.full((5, 6), 256 * 100, dtype=np.uint16)
        write(path, Image.fromarray(grey))
    else:
        write(path, picture(mode=mode))
    write(tmp_path / "a/y.png", picture())
    image, _ = open_images(str(tmp_path), part="train", key=KEY, hold_out=False)[0]
    assert image.mode == "RGB"
    if mode == "I;16":
        assert image.getpixel((0, 0)) == (100, 100, 100)


def test_a_hub_data_set_is_read_by_the_kinds_of_its_columns(tmp_path, monkeypatch):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["tench", "goldfish"])}
    )
    write(tmp_path / "x.png", picture(3))
    rows = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "x.png")] * 3, "label": [1, 0, 1]}, features=features
    )
    asked = []

    def load(*name):
        asked.append(name)
        return rows

    monkeypatch.setattr(sources, "_load_from_hub", load)
    images = open_images("ILSVRC/imagenet-1k", part="train", key=KEY)
    open_images("ILSVRC/imagenet-1k", part="validation", key=KEY)
    hub = ("ILSVRC/imagenet-1k", "")
    assert asked == [(*hub, "", False), (*hub, "validation", False)]
    assert images.classes == ["tench", "goldfish"]
    image, label = images[0]
    assert (image.size, label) == ((40, 30), 1)


@pytest.mark.parametrize("config", ["", "plain"])
def test_the_split_that_is_trained_on_is_not_validated_on(monkeypatch, config):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}
    )
    rows = datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=features)
    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split))
        if split in ("validation", "val"):
            raise ValueError("has train and test")
        return rows

    monkeypatch.setattr(sources, "_load_from_hub", load)
    source = f"uoft-cs/cifar10:{config}:train"
    open_images(source, part="train", key=KEY)
    open_images(source, part="validation", key=KEY)
    open_images(source, part="validation", key="validation.dataset")
    splits = ["train", "validation", "val", "test", "train"]
    assert asked == [("uoft-cs/cifar10", config, split) for split in splits]


def test_a_local_copy_of_a_hub_data_set_is_read_like_it(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {"picture": [picture(i) for i in range(4)], "kind": [0, 1, 1, 0]}
    copy = tmp_path / "copy"
    copy.mkdir()
    for split in ("train", "validation"):
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(copy / f"{split}-00000.parquet"))
    for part in ("train", "validation"):
        images = open_images(str(copy), part=part, key=KEY)
        assert [images[i][1] for i in range(4)] == [0, 1, 1, 0]
        assert np.array_equal(np.array(images[2][0]), np.array(picture(2)))


@pytest.mark.parametrize(
    ("source", "message"),
    [("empty", "no folder of images per class"), ("missing/x", "no such file or folder")],
)
def test_what_holds_no_images_is_refused_with_the_key(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"{KEY} = .*{message}"):
        open_images(str(tmp_path / source), part="train", key=KEY)


def test_a_validation_class_that_training_does_not_know_is_refused(folder):
    write(folder / "val/mouse/1.png", picture())
    with pytest.raises(DataError, match=r'class "mouse" is not among the 2 of training'):
        open_images(str(folder), part="validation", key=KEY, classes=["cat", "dog"])


def test_a_whole_crop_is_the_resized_image():
    image = picture(size=(32, 32))
    # Shapes of 4:3 do not fit a square crop of the whole area: the fallback takes all of it.
    expected = np.array(image.resize((16, 16), Image.Resampling.BILINEAR))
    seen = view_of(image, min_area=1.0, flip=0.0)
    assert torch.equal((seen * 255).round().byte(), torch.from_numpy(expected).permute(2, 0, 1))


def test_mirrored_images_are_mirrored():
    image = picture()
    plain, mirrored = (view_of(image, flip=flip) for flip in (0.0, 1.0))
    assert torch.equal(plain.flip(-1), mirrored)


def test_crops_cover_the_areas_they_should_and_stay_inside():
    ramp = np.stack(np.meshgrid(np.arange(100), np.arange(100), indexing="ij"), -1)
    image = Image.fromarray(np.dstack([ramp, ramp[..., :1]]).astype(np.uint8))
    areas = []
    for seed in range(200):
        pixels = view_of(image, seed, flip=0.0) * 255
        spans = [(p.max() - p.min()).item() / 100 for p in pixels[:2]]
        areas.append(spans[0] * spans[1])
        assert pixels.min() >= 0
        assert pixels.max() <= 99.5
    assert 0.05 < min(areas) < 0.2
    assert max(areas) > 0.75
    assert np.mean(areas) == pytest.approx(0.5, abs=0.1)


def test_the_centre_is_what_is_left_of_the_resized_image():
    image = picture(size=(48, 32))
    view = CentreView(size=14, resize=16, **PLAIN)(image)
    resized = image.resize((24, 16), Image.Resampling.BILINEAR).crop((5, 1, 19, 15))
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    # Resized at once from the box: half a pixel of the border at most differs.
    torch.testing.assert_close(view[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], atol=0.02, rtol=0)


def test_erasing_blanks_one_rectangle_of_the_wanted_area():
    pixels = torch.ones(3, 64, 64)
    shares = []
    for seed in range(100):
        erased = RandomErasing(1.0)(pixels, torch.Generator().manual_seed(seed))
        blank = (erased == 0).all(0)
        rows, cols = blank.any(1).sum(), blank.any(0).sum()
        assert blank.sum() == rows * cols
        shares.append(blank.double().mean().item())
    assert min(shares) > 0.015
    assert max(shares) < 0.36


def test_shifted_pixels_keep_their_neighbours_and_repeat_the_edge():
    rows = torch.arange(10.0).view(1, 10, 1).expand(3, 10, 10)
    seen = set()
    for seed in range(60):
        moved = RandomShift(2)(rows, torch.Generator().manual_seed(seed))
        first = moved[0, 4, 0].item() - 4
        seen.add(first)
        expected = (torch.arange(10.0) + first).clamp(0, 9)
        assert torch.equal(moved, expected.view(1, 10, 1).expand(3, 10, 10))
    assert seen == {-2, -1, 0, 1, 2}


def plane(size=20):
    """Each pixel is its place: column and row in two channels, from -1 to 1."""
    places = (torch.arange(size) + 0.5) * 2 / size - 1
    return torch.stack([places.expand(size, size), places.view(-1, 1).expand(size, size)])


@pytest.mark.parametrize(("degrees", "stretch"), [(0.0, 0.0), (30.0, 0.0), (0.0, 0.2), (10.0, 0.1)])
def test_warped_pixels_come_from_turned_and_stretched_places(degrees, stretch):
    before, inner = plane(), slice(8, 12)  # whose places do not leave the image
    angles, sizes = [], []
    for seed in range(200):
        after = RandomWarp(degrees, stretch)(before, torch.Generator().manual_seed(seed))
        rows = before[:, inner, inner].flatten(1).T
        found = torch.linalg.lstsq(rows, after[:, inner, inner].flatten(1).T)
        assert (rows @ found.solution - after[:, inner, inner].flatten(1).T).abs().max() < 1e-5
        matrix = found.solution.T
        angles.append(torch.atan2(matrix[1, 0], matrix[0, 0]).rad2deg().item())
        sizes.append(matrix[:, 0].norm().log().item())
    for values, most in ((angles, degrees), (sizes, stretch)):
        assert max(map(abs, values)) <= most + 1e-3
        assert min(values) <= 1e-3 - 0.9 * most
        assert max(values) >= 0.9 * most - 1e-3


def batches(folder, world_size, num_batches=6, **options):
    """Global batches as some number of ranks makes them."""
    images = open_images(str(folder), part="train", key=KEY)
    view = random_view(finish=Chain([RandomWarp(5, 0.1), RandomShift(2), RandomErasing(0.3)]))
    loaders = [
        iter(
            PositionedLoader(
                images, seed=3, local_batch_size=8 // world_size, dp_rank=rank,
                dp_world_size=world_size, augment=view, **options,
            )
        )
        for rank in range(world_size)
    ]  # fmt: skip
    for _ in range(num_batches):
        parts = [next(loader) for loader in loaders]
        yield torch.cat([p[0]["input"] for p in parts]), torch.cat([p[1] for p in parts])


@pytest.mark.parametrize("options", [{}, {"mixup": 0.4}, {"num_workers": 1}])
def test_any_number_of_ranks_makes_the_same_batches(folder, options):
    for one, four in zip(batches(folder, 1, **options), batches(folder, 4, **options), strict=True):
        assert torch.equal(one[0], four[0])
        assert torch.equal(one[1], four[1])


def test_an_image_is_seen_differently_in_every_epoch(folder):
    images = open_images(str(folder), part="train", key=KEY)
    loader = PositionedLoader(
        images, seed=0, local_batch_size=20, dp_rank=0, dp_world_size=1,
        augment=random_view(finish=Chain([])),
    )  # fmt: skip
    first, second = (next(batch)[0]["input"] for batch in [iter(loader)] for _ in range(2))
    assert not any(torch.equal(a, b) for a in first for b in second)


def test_broken_images_are_replaced_by_the_next_counted_and_named(folder, caplog):
    broken = folder / "train/cat/1.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    images = open_images(str(folder), part="train", key=KEY)
    with pytest.raises(UnreadableSampleError, match=r"1\.JPEG: OSError: "):
        images[0]
    loader = PositionedLoader(
        images, seed=0, local_batch_size=20, dp_rank=0, dp_world_size=1,
        augment=random_view(finish=Chain([])), max_bad_fraction=0.01,
    )  # fmt: skip
    inputs, _ = next(iter(loader))
    assert len(inputs["input"]) == 20
    assert loader.skipped.count == 1
    assert "1.JPEG" in caplog.text
    view = CentreView(size=8, resize=8, **PLAIN)
    ((_, labels),) = EvaluationLoader(
        TransformedImages(images, view), local_batch_size=20, dp_rank=0, dp_world_size=1,
        max_bad_fraction=0.01,
    )  # fmt: skip
    assert labels.tolist()[:2] == [-100, 0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_broken_images_end_the_run_in_one_line(folder, num_workers):
    for file in (folder / "train").rglob("[0-9]*.*"):
        file.write_bytes(b"no image")
    images = open_images(str(folder), part="train", key=KEY)
    loader = PositionedLoader(
        images, seed=0, local_batch_size=4, dp_rank=0, dp_world_size=1,
        augment=random_view(finish=Chain([])), num_workers=num_workers,
    )  # fmt: skip
    with pytest.raises(DataError, match="20 samples in a row cannot be read, such as") as refusal:
        next(iter(loader))
    assert "\n" not in str(refusal.value)


def test_a_share_of_broken_images_above_the_limit_is_refused_with_the_numbers(folder):
    files = sorted((folder / "train").rglob("[0-9]*.*"))
    files[0].write_bytes(b"no image")
    images = open_images(str(folder), part="train", key=KEY)
    loader = PositionedLoader(
        images, seed=0, local_batch_size=20, dp_rank=0, dp_world_size=1,
        augment=random_view(finish=Chain([])), max_bad_fraction=0.0,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"1 of 1000 samples .* training.max_bad_fraction = 0 "):
        next(iter(loader))


def test_mixing_keeps_the_larger_part_and_the_sum():
    inputs = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    weights = pair_weights(0, 10, 6, 0.3)
    mixed = mix_pairs(inputs, weights.double())
    assert (weights >= 0.5).all()
    torch.testing.assert_close(mixed[0::2] + mixed[1::2], inputs[0::2] + inputs[1::2])
    own = weights[0].double()
    torch.testing.assert_close(mixed[0], own * inputs[0] + (1 - own) * inputs[1])


def test_an_odd_batch_cannot_be_mixed(folder):
    images = open_images(str(folder), part="train", key=KEY)
    with pytest.raises(ValueError, match="local_batch_size: got 3, mixup needs an even one"):
        PositionedLoader(images, seed=0, local_batch_size=3, dp_rank=0, dp_world_size=1, mixup=0.2)
