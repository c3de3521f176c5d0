"""What any layout of ranks saved, any other loads, bit for bit in global coordinates."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from checkpoint.verify import read_manifest
from tests.support.checkpoint_runs import LAYER_METHODS, LAYOUTS, content, run_in, world_of
from tests.support.ranks import run_on_ranks

STEPS, MORE = 4, 10
SOURCES = ("single", "ddp2", "fsdp3", "hsdp2x2", "fsdp2xtp2", "pp2")
CONTINUED = ("ddp2", "fsdp2xtp2")
WORLDS = sorted({world_of(layout) for layout in LAYOUTS})
# One of each kind of step runs every time.
METHODS = ["Shampoo", "KFAC"] + [
    pytest.param(method, marks=pytest.mark.slow)
    for method in ("SOAP", "KLShampoo", "Eva", "EvaF", "EvaS", "FOOF", "AdamW", "SGD")
]


class Saved(NamedTuple):
    """Where a method's checkpoints of every layout are."""

    folder: Path
    method: str

    def run_in(self, source, layout, **settings):
        """A run whose gradients come from its layers has them in double, to compare layouts.

        Blocks of Shampoo's convolution have three dims, which do not lie row-major.
        """
        dtype = torch.float64 if self.method in LAYER_METHODS else torch.float32
        options = {"merge": "paper"} if self.method == "Shampoo" else {}
        folder = self.folder / source
        return run_in(folder, layout, self.method, dtype=dtype, options=options, **settings)


def layouts_of(world):
    return [layout for layout in LAYOUTS if world_of(layout) == world]


def save_all(saved, world):
    """Four steps, across a staggered refresh, in each layout of so many ranks; ten more in some."""
    for layout in layouts_of(world):
        with saved.run_in(layout, layout, interval=STEPS) as run:
            run.manager.load()
            run.train(STEPS)
            if layout in CONTINUED:
                run.train(STEPS + MORE, last=STEPS + MORE)


def load_all(saved, world, sources):
    """Load what each source saved into each layout of this many ranks and save it again."""
    for target in layouts_of(world):
        for source in sources:
            with saved.run_in(source, target, load_only=True) as run:
                run.manager.load(STEPS)
                run.save_to(saved.folder / f"{source}-{target}" / f"step-{STEPS}")


@pytest.fixture(scope="module", params=METHODS)
def saved(request, tmp_path_factory):
    found = Saved(tmp_path_factory.mktemp("layouts"), request.param)
    for world in WORLDS:
        run_on_ranks(world, save_all, found, world)
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_state_of_every_layout_is_loaded_bit_for_bit(saved, world):
    assert_loaded_bit_for_bit(saved, world, SOURCES)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_state_of_the_other_layouts_is_loaded_bit_for_bit(saved, world):
    assert_loaded_bit_for_bit(saved, world, [name for name in LAYOUTS if name not in SOURCES])


def assert_loaded_bit_for_bit(saved, world, sources):
    run_on_ranks(world, load_all, saved, world, sources)
    for source in sources:
        expected = content(saved.folder / source / "checkpoint" / f"step-{STEPS}")
        for target in layouts_of(world):
            loaded = content(saved.folder / f"{source}-{target}" / f"step-{STEPS}")
            assert loaded.keys() == expected.keys(), f"{source} -> {target}"
            for key, value in expected.items():
                assert torch.equal(loaded[key], value), f"{source} -> {target}: {key}"


def go_on(saved, world):
    for target in layouts_of(world):
        for source in CONTINUED:
            with saved.run_in(source, target, load_only=True) as run:
                run.manager.load(STEPS)
                run.train(STEPS + MORE)
                run.save_to(saved.folder / f"{source}+{target}" / f"step-{STEPS + MORE}")


@pytest.mark.parametrize("world", WORLDS)
def test_the_next_ten_steps_are_those_of_the_uninterrupted_run(saved, world):
    run_on_ranks(world, go_on, saved, world)
    for source in CONTINUED:
        expected = content(saved.folder / source / "checkpoint" / f"step-{STEPS + MORE}")
        for target in layouts_of(world):
            found = content(saved.folder / f"{source}+{target}" / f"step-{STEPS + MORE}")
            for key in (key for key in expected if key.startswith("model.")):
                gap = float((found[key] - expected[key]).abs().max())
                assert gap <= 1e-9 * (1 + float(expected[key].abs().max())), (
                    f"{source} -> {target}: {key} differs by {gap:.1e}"
                )


def test_each_element_is_stored_once_and_keys_do_not_name_ranks(saved):
    folders = {name: saved.folder / name / "checkpoint" / f"step-{STEPS}" for name in LAYOUTS}
    found = {name: shapes_in(folder) for name, folder in folders.items()}
    for name, shapes in found.items():
        assert shapes == found["single"], name


def shapes_in(folder):
    """Dtype and shape of every tensor but the generators', which have a row for each rank."""
    tensors = read_manifest(folder).tensors
    return {
        key: (entry.dtype, entry.shape)
        for key, entry in tensors.items()
        if not key.startswith("rng.")
    }
