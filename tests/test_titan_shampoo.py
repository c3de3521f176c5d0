"""Twenty steps of Shampoo in the real trainer end at the same weights on every mesh."""

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tests.support.ranks import run_on_ranks
from tests.support.titan_runs import GLOBAL_BATCH, LAYOUTS, text_run, trainer_of, write_text

MESHES = ("fsdp2", "ddp2", "tp2", "hsdp2x2", "fsdp2_tp2")


def shampoo_run(folder, name, num_readers, period, settings):
    return text_run(
        folder,
        name,
        **{
            "optimizer__name": "Shampoo",
            "optimizer__lr": 1e-4,  # roots of small eigenvalues amplify rounding
            "optimizer__shampoo__block_size": 48,
            "optimizer__shampoo__start_step": 1,
            "optimizer__shampoo__precondition_frequency": period,
            "optimizer__shampoo__eps_relative": 1e-6,
            "training__steps": 20,
            "training__local_batch_size": GLOBAL_BATCH // num_readers,
            **settings,
        },
    )


def final_weights(runs):
    results = []
    for args in runs:
        with trainer_of(args) as trainer:
            trainer.train()
            options = StateDictOptions(full_state_dict=True)
            weights: Any = get_model_state_dict(trainer.model_parts[0], options=options)
            results.append({name: tensor.clone() for name, tensor in weights.items()})
    return results


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.slow), 3],
    ids=["period 1", "period 3"],
)
def weights(request, tmp_path_factory):
    """Final weights by mesh; "one" is one rank."""
    folder = tmp_path_factory.mktemp("shampoo")
    write_text(folder)
    found = {}
    one = shampoo_run(folder, "one", 1, request.param, {})
    found["one"] = run_on_ranks(1, final_weights, [one])[0][0]
    for world_size in (2, 4):
        names = [name for name in MESHES if LAYOUTS[name][0] == world_size]
        runs = [
            shampoo_run(folder, name, LAYOUTS[name][1], request.param, LAYOUTS[name][2])
            for name in names
        ]
        results = run_on_ranks(world_size, final_weights, runs)[0]
        found |= dict(zip(names, results, strict=True))
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_weights_after_twenty_steps_are_those_of_one_rank(weights, mesh):
    for name, expected in weights["one"].items():
        error = torch.linalg.vector_norm(weights[mesh][name] - expected)
        assert error <= 1e-3 * torch.linalg.vector_norm(expected), name
