"""A mixture of experts learns the same under expert parallelism, each expert by itself."""

import pytest
from torch.distributed.tensor import DTensor

from tests.support.block_views import of_blocks
from tests.support.internals import plan_of
from tests.support.ranks import run_on_ranks
from tests.support.titan_runs import records, text_run, train_all, trainer_of, write_text

GLOBAL_BATCH = 8
LAYOUTS = {
    "fsdp2": (2, {}),
    "fsdp2_ep2": (2, {"parallelism__expert_parallel_degree": 2}),
    "fsdp4_ep2": (4, {"parallelism__expert_parallel_degree": 2}),
    "hsdp2x2_ep2": (
        4,
        {
            "parallelism__expert_parallel_degree": 2,
            "parallelism__data_parallel_replicate_degree": 2,
        },
    ),
}


def run_of(folder, name, ranks, settings):
    shared = {
        "model__name": "llama4",
        "model__flavor": "byte_moe_debug",
        "training__local_batch_size": GLOBAL_BATCH // ranks,
        "training__steps": 4,
    }
    shampoo = {
        "optimizer__name": "Shampoo",
        "optimizer__shampoo__block_size": 64,
        "optimizer__shampoo__precondition_frequency": 2,
        "optimizer__shampoo__eps_relative": 1e-4,
    }
    method = {} if "optimizer__name" in settings else shampoo
    return text_run(folder, name, **{**shared, **method, **settings})


def factors_by_expert(args):
    """Which factors of a stack of experts this rank keeps, and where the stack is stored."""
    with trainer_of(args) as trainer:
        trainer.train()
        (shampoo,) = trainer.optimizers.optimizers
        (name, param) = next(
            (name, param)
            for part in trainer.model_parts
            for name, param in part.named_parameters()
            if name == "layers.0.moe.experts.w1"
        )
        grid = shampoo.grids()[name]
        plan = plan_of(shampoo)
        blocks = [block for block in plan.blocks if plan.params[block.param].name == name]
        lefts = sorted(of_blocks(shampoo.state[param], "left"))
        assert isinstance(param, DTensor)
        return grid.batch_dims, grid.counts, sum(block.is_cut for block in blocks), lefts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    write_text(folder)
    runs = {
        ranks: [run_of(folder, name, ranks, settings)
                for name, (on, settings) in LAYOUTS.items() if on == ranks]
        for ranks in (2, 4)
    }  # fmt: skip
    run_on_ranks(1, train_all, [run_of(folder, "one", 1, {})])
    for ranks, some in runs.items():
        run_on_ranks(ranks, train_all, some)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_equal_those_of_one_rank(trained, layout):
    one, other = (records(trained, name, "loss") for name in ("one", layout))
    assert sorted(one) == sorted(other) == [1, 2, 3, 4]
    assert other[1] == pytest.approx(one[1], rel=1e-6)
    assert other[4] == pytest.approx(one[4], rel=1e-3)
    assert one[4] < one[1]
    one, other = (records(trained, name, "grad_norm") for name in ("one", layout))
    assert other[1] == pytest.approx(one[1], rel=1e-5)


def test_every_expert_has_factors_of_its_own_where_it_is_stored(tmp_path):
    write_text(tmp_path)
    settings = {"parallelism__expert_parallel_degree": 2, "optimizer__shampoo__block_size": 256}
    args = run_of(tmp_path, "factors", 2, settings | {"training__steps": 1})
    results = run_on_ranks(2, factors_by_expert, args)
    for rank, (batch_dims, counts, cut, lefts) in enumerate(results):
        assert (batch_dims, counts, cut) == (1, (4, 1, 1), 0)
        assert lefts == [2 * rank, 2 * rank + 1]


def states_of_experts(args):
    """Shapes of the state of one stack, and metrics of all layers, after a run."""
    with trainer_of(args) as trainer:
        trainer.train()
        name = "layers.0.moe.experts.w1"
        state = trainer.optimizers.state_dict()
        shapes = {key.removeprefix(f"{name}."): tuple(value.shape)
                  for key, value in state.items() if key.startswith(name)}  # fmt: skip
        return shapes, trainer.optimizers.layer_metrics()


def test_the_stack_gives_experts_to_eva_one_by_one(tmp_path):
    write_text(tmp_path)
    settings = {"optimizer__name": "Eva", "training__steps": 2}
    runs = [run_of(tmp_path, "one", 1, settings), run_of(tmp_path, "two", 2, {
        **settings, "parallelism__expert_parallel_degree": 2})]  # fmt: skip
    ((shapes, metrics),) = run_on_ranks(1, states_of_experts, runs[0])
    assert shapes == {
        "step": (4,),
        "batches": (4,),
        "input_mean": (4, 96),
        "output_sum": (4, 128),
        "momentum": (4, 128, 96),
    }
    assert {"layers.0.moe.experts.w1", "layers.2.moe.experts.w2"} <= metrics.keys()
    for other, others in run_on_ranks(2, states_of_experts, runs[1]):
        assert other == shapes
        for name, numbers in metrics.items():
            assert others[name] == pytest.approx(numbers, rel=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Shampoo", "Eva"])
def test_a_run_under_expert_parallelism_resumes_on_one_rank(tmp_path, method):
    write_text(tmp_path)
    saves = {"checkpoint__enable": True, "checkpoint__interval": 2}
    four = {"lr_scheduler__total_steps": 4, "training__steps": 4, "optimizer__name": method}
    four |= {"optimizer__lr": 0.1} if method == "Eva" else {}
    first = {**four, **saves, "training__steps": 2, "parallelism__expert_parallel_degree": 2}
    run_on_ranks(2, train_all, [run_of(tmp_path, "run", 2, first)])
    runs = [run_of(tmp_path, "run", 1, {**four, **saves}), run_of(tmp_path, "whole", 1, four)]
    run_on_ranks(1, train_all, runs)
    run, whole = (records(tmp_path, name, "loss") for name in ("run", "whole"))
    assert run == pytest.approx(whole, rel=1e-5)
