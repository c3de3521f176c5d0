"""Methods for layers in the real trainer: the same weights on every mesh, and on every resume."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.layer_methods import loss_of
from tests.support.layer_models import Mixed, made
from tests.support.optimizer_containers import (
    container_of,
    optimizer_config,
    parameters,
    same,
    whole,
)
from tests.support.ranks import run_on_ranks
from tests.support.titan_runs import (
    GLOBAL_BATCH,
    LAYOUTS,
    records,
    text_run,
    train_all,
    trainer_of,
    write_text,
)
from titan_shampoo.statistics import SPLIT_BACKWARD_SCHEDULES
from titan_shampoo.titan.optimizers import OptimizersContainer

TABLES = {"Eva": "eva", "EvaF": "eva_f", "EvaS": "eva_s", "FOOF": "foof", "KFAC": "kfac"}
OWN_KEYS: dict[str, dict[str, Any]] = {
    "EvaF": {"damping_mode": "relative"},
    "FOOF": {"precondition_frequency": 2, "max_factor_dim": 4},
    "KFAC": {"precondition_frequency": 2, "factored_damping": False},
}

every_method = pytest.mark.parametrize("method", TABLES)


# Meshes


def eva_run(folder, name, num_readers, settings):
    return text_run(
        folder,
        name,
        **{
            "optimizer__name": "Eva",
            "optimizer__lr": 0.01,
            "optimizer__eva__damping": 0.01,
            "training__steps": 8,
            "training__local_batch_size": GLOBAL_BATCH // num_readers,
            **settings,
        },
    )


def losses(folder, name):
    return records(folder, name, "loss")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The dump folders of all meshes."""
    folder = tmp_path_factory.mktemp("eva")
    write_text(folder)
    run_on_ranks(1, train_all, [eva_run(folder, "one", 1, {})])
    for world_size in (2, 4):
        runs = [
            eva_run(folder, name, num_readers, settings)
            for name, (size, num_readers, settings) in LAYOUTS.items()
            if size == world_size
        ]
        run_on_ranks(world_size, train_all, runs)
    return folder


@pytest.mark.parametrize("mesh", LAYOUTS)
def test_losses_of_eight_steps_are_those_of_one_rank(trained, mesh):
    expected = losses(trained, "one")
    assert expected[8] < expected[1]
    assert losses(trained, mesh) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mesh", LAYOUTS)
def test_extremes_of_all_layers_are_recorded_on_every_mesh(trained, mesh):
    for kind in ("rho", "cosine"):
        for label in ("min", "median", "max"):
            expected = records(trained, "one", f"{kind}_{label}")
            assert sorted(expected) == list(range(1, 9))
            found = records(trained, mesh, f"{kind}_{label}")
            assert found == pytest.approx(expected, rel=2e-2)
        names = records(trained, mesh, f"{kind}_max_layer")
        assert all(str(name).endswith(".weight") for name in names.values())


VARIANTS: dict[str, dict[str, Any]] = {
    "compiled": {"compile__enable": True, "compile__backend": "aot_eager"},
    "recomputed": {"activation_checkpoint__mode": "full"},
    "selected": {
        "activation_checkpoint__mode": "selective",
        "activation_checkpoint__selective_ac_option": "op",
    },
}


def test_compilation_and_recomputation_change_nothing(trained):
    runs = [eva_run(trained, name, 1, settings) for name, settings in VARIANTS.items()]
    run_on_ranks(1, train_all, runs)
    expected = losses(trained, "one")
    for name in VARIANTS:
        assert losses(trained, name) == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("method", ["EvaF", "EvaS", "FOOF", "KFAC"])
def test_every_method_lowers_the_loss(trained, method):
    keys = {"optimizer__name": method, "optimizer__lr": 0.02, "training__steps": 8}
    run_on_ranks(2, train_all, [text_run(trained, method, **keys)])
    found = losses(trained, method)
    assert found[8] < found[1]


# Checkpoints


def build(method: str, seed: int) -> tuple[Any, OptimizersContainer]:
    """A model, sharded by FSDP2 if there are several ranks, and its optimizers."""
    model = made(Mixed, seed)
    if dist.is_initialized() and dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in model.children():
            fully_shard(module, mesh=mesh)
    config = optimizer_config("AdamW")
    config.name, config.lr = method, 0.05
    for key, value in OWN_KEYS.get(method, {}).items():
        setattr(getattr(config, TABLES[method]), key, value)
    # Every rank sees the same six images.
    config.kfac.loss_normaliser = 6.0 * (dist.get_world_size() if dist.is_initialized() else 1)
    return model, container_of(model, config)


def copied(container: OptimizersContainer) -> dict[str, Tensor]:
    """The state in global coordinates; what is whole on a rank is not copied by itself."""
    return {name: value.clone() for name, value in whole(container.state_dict()).items()}


def step(model: Any, container: OptimizersContainer, number: int) -> None:
    """One step on data that is the same on every layout."""
    container.zero_grad()
    loss_of(model, number).backward()
    container.step()


def train_save_and_resume(method: str, folder: str) -> tuple[Any, ...]:
    model, container = build(method, seed=1)
    for number in range(1, 5):
        step(model, container, number)
    saved = copied(container)
    dcp.save(
        {"optimizer": container, "model": dict(model.named_parameters())}, checkpoint_id=folder
    )
    step(model, container, 5)
    return saved, parameters(model), *resume(method, folder)


def resume(method: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state that another model and its optimizers have loaded, and the weights a step later."""
    model, container = build(method, seed=2)
    step(model, container, 9)  # whatever is not loaded is wrong
    dcp.load(
        {"optimizer": container, "model": dict(model.named_parameters())}, checkpoint_id=folder
    )
    loaded = copied(container)
    step(model, container, 5)
    return loaded, parameters(model)


@every_method
def test_a_checkpoint_of_two_ranks_resumes_on_two_and_on_one(method, tmp_path):
    folder = str(tmp_path / "step-4")
    results = run_on_ranks(2, train_save_and_resume, method, folder)
    for saved, after, loaded, resumed in results:
        assert same(loaded, saved)
        assert same(resumed, after)
    saved, after = results[0][:2]
    ((loaded, resumed),) = run_on_ranks(1, resume, method, folder)
    assert same(loaded, saved)
    for name, expected in after.items():
        torch.testing.assert_close(resumed[name], expected, rtol=1e-10, atol=1e-13, msg=name)


def state_keys(method: str) -> list[str]:
    return list(build(method, seed=0)[1].state_dict())


@every_method
def test_names_in_a_checkpoint_do_not_depend_on_rank_or_mesh(method):
    first, second = run_on_ranks(2, state_keys, method)
    assert set(first) == set(second) == set(state_keys(method))


def test_schedules_that_skip_taps_are_those_that_the_statistics_name():
    from titan_shampoo.config.methods import _SPLIT_BACKWARD  # noqa: PLC0415

    assert {name.lower() for name in _SPLIT_BACKWARD} == SPLIT_BACKWARD_SCHEDULES


def groups_of_a_run(args: list[str]) -> list[tuple[str, int]]:
    with trainer_of(args) as trainer:
        optimizers = trainer.optimizers.optimizers
        return [(type(one).__name__, len(one.state)) for one in optimizers]


def test_parts_of_an_interleaved_pipeline_share_one_optimizer(trained):
    settings = {
        "parallelism__pipeline_parallel_degree": 2,
        "parallelism__pipeline_parallel_schedule": "Interleaved1F1B",
        "parallelism__pipeline_parallel_layers_per_stage": 1,
        "parallelism__pipeline_parallel_first_stage_less_layers": 0,
        "parallelism__pipeline_parallel_last_stage_less_layers": 0,
    }
    args = eva_run(trained, "interleaved", 1, settings)
    for found in run_on_ranks(2, groups_of_a_run, args):
        assert [name for name, _ in found] == ["Eva"]
