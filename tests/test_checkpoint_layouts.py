"""What any layout of ranks saved, any other loads, bit for bit in global coordinates."""

import pytest
import torch

from checkpoint.verify import read_manifest
from tests.checkpoint_runs import LAYOUTS, content, run_in, world_of
from tests.ranks import run_on_ranks

STEPS, MORE = 4, 10
SOURCES = ("single", "ddp2", "fsdp3", "hsdp2x2", "fsdp2xtp2", "pp2")
CONTINUED = ("ddp2", "fsdp2xtp2")
WORLDS = sorted({world_of(layout) for layout in LAYOUTS})


def layouts_of(world):
    return [layout for layout in LAYOUTS if world_of(layout) == world]


def save_all(folder, world):
    """Four steps, across a staggered refresh, in each layout of so many ranks; ten more in some."""
    for layout in layouts_of(world):
        with run_in(folder / layout, layout, interval=STEPS) as run:
            run.manager.load()
            run.train(STEPS)
            if layout in CONTINUED:
                run.train(STEPS + MORE, last=STEPS + MORE)


def load_all(folder, world, sources):
    """Load what each source saved into each layout of this many ranks and save it again."""
    for target in layouts_of(world):
        for source in sources:
            with run_in(folder / source, target, load_only=True) as run:
                run.manager.load(STEPS)
                run.save_to(folder / f"{source}-{target}" / f"step-{STEPS}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    for world in WORLDS:
        run_on_ranks(world, save_all, folder, world)
    return folder


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
        expected = content(saved / source / "checkpoint" / f"step-{STEPS}")
        for target in layouts_of(world):
            loaded = content(saved / f"{source}-{target}" / f"step-{STEPS}")
            assert loaded.keys() == expected.keys(), f"{source} -> {target}"
            for key, value in expected.items():
                assert torch.equal(loaded[key], value), f"{source} -> {target}: {key}"


def without_pipelines(world):
    """A stage of a pipeline spreads its own refreshes, so its next steps are others."""
    return [layout for layout in layouts_of(world) if not layout.startswith("pp")]


def go_on(folder, world):
    for target in without_pipelines(world):
        for source in CONTINUED:
            with run_in(folder / source, target, load_only=True) as run:
                run.manager.load(STEPS)
                run.train(STEPS + MORE)
                run.save_to(folder / f"{source}+{target}" / f"step-{STEPS + MORE}")


@pytest.mark.parametrize("world", WORLDS)
def test_the_next_ten_steps_are_those_of_the_uninterrupted_run(saved, world):
    run_on_ranks(world, go_on, saved, world)
    for source in CONTINUED:
        expected = content(saved / source / "checkpoint" / f"step-{STEPS + MORE}")
        for target in without_pipelines(world):
            found = content(saved / f"{source}+{target}" / f"step-{STEPS + MORE}")
            for key in (key for key in expected if key.startswith("model.")):
                torch.testing.assert_close(
                    found[key],
                    expected[key],
                    rtol=1e-9,
                    atol=1e-9,
                    msg=f"{source} -> {target}: {key}",
                )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_element_is_stored_once_and_keys_do_not_name_ranks(saved, layout):
    manifests = [
        read_manifest(saved / name / "checkpoint" / f"step-{STEPS}") for name in (layout, "single")
    ]
    mine, single = (
        {key: (entry.dtype, entry.shape) for key, entry in manifest.tensors.items()}
        for manifest in manifests
    )
    for kept in (mine, single):  # a row per rank
        for key in [key for key in kept if key.startswith("rng.")]:
            del kept[key]
    assert mine == single
