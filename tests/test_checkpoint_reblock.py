"""Factors for another block size: exact where they can be, near where they cannot."""

import pytest
import torch

from checkpoint.compare import geometry_problems
from checkpoint.errors import CheckpointError
from checkpoint.reblock import block_places, new_factors
from tests.support.checkpoint_runs import content, run_in
from tests.support.ranks import run_on_ranks
from titan_shampoo.distributed.geometry import make_grid
from titan_shampoo.functional.symmetric import unpack
from titan_shampoo.titan.config import JobConfig

ROWS, COLS = 10, 12


def gradients(count=8):
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.2, 2, ROWS).double()[:, None]
    draws = torch.randn(count, ROWS, COLS, generator=generator, dtype=torch.float64)
    return scale * draws


def factors_of(grid):
    """``sum G G^T`` and ``sum G^T G`` of every block, from the definition."""
    found: dict[str, list[torch.Tensor]] = {}
    places = block_places(grid)
    for position, keys in places.items():
        corner, extent = grid.block_start(position), grid.block_extent(position)
        rows, cols = (slice(a, a + n) for a, n in zip(corner, extent, strict=True))
        block = gradients()[:, rows, cols]
        sums = ((block @ block.mT).sum(0), (block.mT @ block).sum(0))
        for (key, _), value in zip(keys, sums, strict=True):
            found.setdefault(key, []).append(value)
    return {key: torch.stack(values) for key, values in found.items()}


def recut(old_size, new_size):
    """For each block of the new grid: (approximate, true) left and right factors."""
    old, new = (make_grid((ROWS, COLS), block_size=size) for size in (old_size, new_size))
    factors, true = factors_of(old), factors_of(new)
    for position, keys in block_places(new).items():
        found = new_factors(old, factors, new, position)
        yield [
            (found[side], true[key][index])
            for side, (key, index) in zip(("left", "right"), keys, strict=True)
        ]


def direction(grad, left, right):
    """``L^(-1/4) G R^(-1/4)``, damped as a factor of few samples must be."""
    roots = []
    for factor in (left, right):
        values, basis = torch.linalg.eigh(factor)
        roots.append(basis * (values + 0.01 * values.max()) ** -0.25 @ basis.mT)
    return roots[0] @ grad @ roots[1]


def assert_equal(pairs):
    for found, true in pairs:
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [3, 4, (5, 2), 100])
def test_the_same_grid_keeps_its_factors(size):
    for sides in recut(size, size):
        assert_equal(sides)


def test_splitting_rows_keeps_left_factors_exact_and_merging_them_right_ones():
    for left, _ in recut((10, 12), (4, 12)):
        assert_equal([left])
    for _, right in recut((5, 12), (10, 12)):
        assert_equal([right])


def test_splitting_columns_keeps_right_factors_exact_and_merging_them_left_ones():
    for _, right in recut((10, 12), (10, 5)):
        assert_equal([right])
    for left, _ in recut((10, 4), (10, 12)):
        assert_equal([left])


@pytest.mark.parametrize(("old", "new"), [(4, 3), (3, 4), ((2, 12), (10, 3)), (12, 4), (4, 12)])
def test_every_cut_keeps_the_energy_and_stays_near(old, new):
    for sides in recut(old, new):
        for found, true in sides:
            assert torch.linalg.eigvalsh(found).min() > -1e-10
            assert found.trace() == pytest.approx(true.trace(), rel=0.5)
        grad = gradients(9)[-1][: len(sides[0][0]), : len(sides[1][0])]
        near, exact = (direction(grad, *factors) for factors in zip(*sides, strict=True))
        assert (near * exact).sum() / near.norm() / exact.norm() > 0.97


def save(folder):
    with run_in(folder, "fsdp2", options={"block_size": 4}) as run:
        run.manager.load()
        run.train(6)


def load(folder, layout, size, name):
    with run_in(
        folder, layout, options={"block_size": size}, reblock="approximate", load_only=True
    ) as run:
        run.manager.load()
        run.save_to(folder / name / "step-6")
        run.train(9)
        return [bool(p.detach().isfinite().all()) for p in run.model.parameters()]


def test_a_run_goes_on_with_blocks_of_another_size_on_any_layout(tmp_path):
    run_on_ranks(2, save, tmp_path)
    before = content(tmp_path / "checkpoint" / "step-6")
    for layout, world in (("single", 1), ("fsdp3", 3)):
        assert all(all(good) for good in run_on_ranks(world, load, tmp_path, layout, 3, layout))
    one, three = (content(tmp_path / layout / "step-6") for layout in ("single", "fsdp3"))
    assert one.keys() == three.keys()
    assert all(torch.equal(one[key], three[key]) for key in one)
    for key in before.keys() & one.keys():
        if key.startswith("model.") or "exp_avg" in key or key.endswith(("step", "momentum")):
            assert torch.equal(before[key], one[key]), key
    left, root = (one[f"optim.wq.weight.{name}.3"][0].double() for name in ("left", "left_root"))
    count = int(before["optim.wq.weight.step"])
    average = unpack(left, 3) / (1 - JobConfig().optimizer.beta2 ** count)
    identity = torch.linalg.matrix_power(root, 4) @ average
    torch.testing.assert_close(identity, torch.eye(3).double(), rtol=0, atol=1e-3)


def load_same_size(folder):
    with run_in(folder, "fsdp2", reblock="approximate", load_only=True) as run:
        run.manager.load()
        run.save_to(folder / "same" / "step-6")


def test_nothing_is_approximated_where_blocks_are_the_same(tmp_path):
    run_on_ranks(2, save, tmp_path)
    run_on_ranks(2, load_same_size, tmp_path)
    before, after = content(tmp_path / "checkpoint" / "step-6"), content(tmp_path / "same/step-6")
    assert all(torch.equal(before[key], after[key]) for key in before)


def load_shards(folder, reblock):
    options = {"block_size": 4, "block_alignment": "shard"}
    with run_in(folder, "fsdp3", options=options, reblock=reblock, load_only=True) as run:
        try:
            run.manager.load()
        except CheckpointError as error:
            return str(error)
    return "nothing"


def save_shards(folder):
    with run_in(folder, "fsdp2", options={"block_size": 4, "block_alignment": "shard"}) as run:
        run.manager.load()
        run.train(1)


def test_blocks_cut_where_shards_end_are_refused_with_advice_that_works(tmp_path):
    run_on_ranks(2, save_shards, tmp_path)
    for reblock in ("refuse", "approximate"):
        said = run_on_ranks(3, load_shards, tmp_path, reblock)
        assert len(set(said)) == 1
        assert "weight: blocks cut at (0, 4, 5, 8, 10) x (0, 4, 8, 12) in the check" in said[0]
        assert (
            'in this run; block_alignment = "shard" cuts them where shards end: resume on ranks '
            "that shard as those that saved it, or set checkpoint.exclude_from_loading = "
            '["optimizer"]; checkpoint.reblock is for block_alignment = "global"'
        ) in said[0]


def test_advice_names_the_option_that_differs():
    def described(alignment, size, edges):
        return {
            "method": "shampoo",
            "shape": [10, 12],
            "grid": {"merged_shape": [10, 12], "edges": [edges, [0, 12]], "batch_dims": 0},
            "options": {"block_size": size, "block_alignment": alignment},
        }

    own = described("global", 5, [0, 5, 10])
    for saved, words in [
        (described("global", 10, [0, 10]), ['set block_size = 10, or checkpoint.reblock = "app']),
        (
            described("shard", 5, [0, 3, 5, 10]),
            ['set block_alignment = "shard", and resume on ranks that shard as those that saved'],
        ),
    ]:
        (line,) = geometry_problems({"wq": own}, {"wq": saved})
        assert all(word in line for word in words), line
