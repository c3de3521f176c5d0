"""``train.py --plan``: its figures are what real ranks are seen to hold."""

import json
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.tensor import DTensor

from checkpoint.state import RunState
from parallel.recipes import recipe_of
from tests.support.internals import kept_tensors
from tests.support.message_buffers import Buffers
from tests.support.ranks import PATIENCE, run_on_ranks
from tests.support.titan_runs import image_run, text_run, trainer_of, write_text
from titan_shampoo import titan
from titan_shampoo.config import ConfigError, check_world, read_config, read_plan_request
from titan_shampoo.layers.kronecker import KroneckerStep
from titan_shampoo.layers.moments import Moments
from titan_shampoo.titan.config import make_job_config
from titan_shampoo.titan.planning import RunPlan

ROOT = Path(__file__).parent.parent
DDP = {
    "parallelism__data_parallel_replicate_degree": 4,
    "parallelism__data_parallel_shard_degree": 1,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "Shampoo, fsdp": {"optimizer__name": "Shampoo"},
    "SOAP, hsdp": {"optimizer__name": "SOAP", "parallelism__data_parallel_replicate_degree": 2},
    "KLShampoo, fsdp x tp": {
        "optimizer__name": "KLShampoo",
        "parallelism__tensor_parallel_degree": 2,
        "optimizer__kl_shampoo__momentum": 0.9,
    },
    "Shampoo, pp x fsdp": {
        "optimizer__name": "Shampoo",
        "parallelism__pipeline_parallel_degree": 2,
        "parallelism__pipeline_parallel_microbatch_size": 2,
    },
    "Shampoo, experts": {
        "optimizer__name": "Shampoo",
        "model__name": "llama4",
        "model__flavor": "byte_moe_debug",
        "optimizer__shampoo__block_size": 64,
        "parallelism__expert_parallel_degree": 2,
    },
    "AdamW, ddp": {"optimizer__name": "AdamW", **DDP},
    "SGD, fsdp": {"optimizer__name": "SGD", "optimizer__sgd__momentum": 0.9},
    "Eva, fsdp": {"optimizer__name": "Eva"},
    "EvaF, fsdp x tp": {
        "optimizer__name": "EvaF",
        "parallelism__tensor_parallel_degree": 2,
    },
    "EvaS, hsdp": {"optimizer__name": "EvaS", "parallelism__data_parallel_replicate_degree": 2},
    "FOOF, hsdp": {"optimizer__name": "FOOF", "parallelism__data_parallel_replicate_degree": 2},
    "KFAC, fsdp x tp": {
        "optimizer__name": "KFAC",
        "optimizer__kfac__max_factor_dim": 64,
        "parallelism__tensor_parallel_degree": 2,
    },
    "KFAC, pp x fsdp": {
        "optimizer__name": "KFAC",
        "optimizer__kfac__factored_damping": False,
        "parallelism__pipeline_parallel_degree": 2,
        "parallelism__pipeline_parallel_microbatch_size": 2,
    },
}
LAYOUTS["Shampoo, interleaved pp x fsdp"] = INTERLEAVED = {
    **LAYOUTS["Shampoo, pp x fsdp"],
    "parallelism__pipeline_parallel_layers_per_stage": 1,
    "parallelism__pipeline_parallel_schedule": "Interleaved1F1B",
    "parallelism__pipeline_parallel_first_stage_less_layers": 0,
    "parallelism__pipeline_parallel_last_stage_less_layers": 0,
}


def bytes_of(tensors: Any) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in local)


class MomentsOfABatch:
    """Bytes of second moments on this rank, and of their largest sum for one owner."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.most_bytes = 0
        observe, summed = KroneckerStep.observe, Moments._summed
        sums = [0]

        def observed(own: KroneckerStep, taken: Any) -> None:
            formed = bytes_of(own.statistics())
            observe(own, taken)
            self.most_bytes = max(self.most_bytes, formed + max(sums))

        def counted(own: Moments, group: Any, owner: int, blocks: Any) -> Any:
            found = summed(own, group, owner, blocks)
            sums.append(sum(bytes_of(parts) for parts in found.values()))
            return found

        patch.setattr(KroneckerStep, "observe", observed)
        patch.setattr(Moments, "_summed", counted)


def measured(runs: list[list[str]]) -> list[dict[str, int]]:
    """Bytes on this rank after one step of each run."""
    return [_measured(args) for args in runs]


def _measured(args: list[str]) -> dict[str, int]:
    with pytest.MonkeyPatch.context() as patch, trainer_of(args) as trainer:
        buffers, moments = Buffers(patch), MomentsOfABatch(patch)
        trainer.train()
        params = [param for part in trainer.model_parts for param in part.parameters()]
        found = Counter({
            "parameters": bytes_of(params),
            "gradients": bytes_of(param.grad for param in params),
            "buffers": bytes_of(b for part in trainer.model_parts for b in part.buffers()),
        })  # fmt: skip
        for optimizer in trainer.optimizers.optimizers:
            states = optimizer.state.values()
            found["state"] += bytes_of(
                value for state in states for key, value in state.items() if key != "blocks"
            )
            for tensors in kept_tensors(optimizer).values():
                found["in a step"] += bytes_of(tensors)
        if buffers.most_bytes + moments.most_bytes:
            found["in a step"] += buffers.most_bytes + moments.most_bytes
        return dict(found)


def plan_of(args: list[str], world_size: int) -> RunPlan:
    settings = read_config(args)
    check_world(settings, world_size)
    job_config = make_job_config(settings)
    return titan.plan_run(job_config, recipe_of(job_config.model.name), world_size)


def planned(plan: RunPlan) -> list[dict[str, float]]:
    """What the plan says of each rank, in the same classes as what is measured."""
    found: dict[int, Counter[str]] = {}
    for stage in plan.stages:
        for what, figures, unit in stage.rows:
            kinds = ("state", "in a step", "parameters", "gradients", "buffers")
            kind = next((kind for kind in kinds if kind in what and "sent" not in what), None)
            for rank, value in zip(stage.ranks, figures, strict=True):
                if unit == "B" and kind:
                    found.setdefault(rank, Counter())[kind] += value
    return [dict(found[rank]) for rank in sorted(found)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("plans")
    write_text(folder)
    found = {
        name: text_run(folder, name, training__steps=1, **settings)
        for name, settings in LAYOUTS.items()
    }
    images = {"optimizer__name": "Shampoo", "optimizer__shampoo__block_size": 256}
    return found | {"Shampoo, images, ddp": image_run(folder, "images", **images, **DDP)}


@pytest.fixture(scope="module")
def measurements(runs: dict[str, list[str]]) -> dict[str, list[dict[str, int]]]:
    """By run, what each of four ranks holds."""
    results = run_on_ranks(4, measured, list(runs.values()))
    return {name: [rank[i] for rank in results] for i, name in enumerate(runs)}


@pytest.mark.parametrize("run", [*LAYOUTS, "Shampoo, images, ddp"])
def test_memory_is_what_four_ranks_hold(
    runs: dict[str, list[str]], measurements: dict[str, list[dict[str, int]]], run: str
) -> None:
    ranks = planned(plan_of(runs[run], 4))
    assert len(ranks) == 4
    for mine, seen in zip(ranks, measurements[run], strict=True):
        for kind, size in seen.items():
            assert mine.get(kind, 0) == pytest.approx(size, rel=0.02, abs=64), kind
        assert mine.keys() >= seen.keys()


def test_figures_for_programs_have_every_part_of_an_interleaved_pipeline(
    tmp_path: Path,
) -> None:
    write_text(tmp_path)
    found = plan_of(text_run(tmp_path, "interleaved", **INTERLEAVED), 4).as_json()
    for stage in found["stages"]:
        assert set(stage["methods"]) == {"Shampoo", "Shampoo 2"}
        memory = [
            figures
            for what, figures in stage["per_rank"].items()
            if stage["units"][what] == "B" and "sent in" not in what
        ]
        assert [sum(of_rank) for of_rank in zip(*memory, strict=True)] == stage["memory"]


def saved_keys(args: list[str]) -> set[str]:
    """Tensors that a checkpoint of this run would have of this rank."""
    with trainer_of(args) as trainer:
        state = RunState(trainer.model_parts, trainer.optimizers, {})
        return set(state.tensors(state.components))


def test_a_plan_counts_the_tensors_of_a_checkpoint(runs: dict[str, list[str]]) -> None:
    args = runs["Shampoo, pp x fsdp"]
    keys: set[str] = set().union(*run_on_ranks(4, saved_keys, args))
    plan = plan_of(args, 4)
    assert sum(stage.keys for stage in plan.stages) == len(keys) > 100
    assert f"tensors in a checkpoint: {len(keys):,}" in str(plan)


def run_train(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


def test_plan_of_llama_8b_on_512_ranks_is_printed_in_a_minute(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = run_train(
        "--plan", "--json", "--world-size", "512", "--model.flavor", "8B",
        f"--job.dump_folder={tmp_path}", "--optimizer.name=Shampoo",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    (stage,) = json.loads(found.stdout)["stages"]
    assert stage["ranks"] == list(range(512))
    assert sum(stage["per_rank"]["parameters"]) == 4 * 8_030_261_248
    assert stage["methods"]["Shampoo"]["imbalance"] < 1.05
    assert not list(tmp_path.iterdir())


def test_flags_of_the_plan_are_refused_without_it() -> None:
    for flag in ("--json", "--world-size=8"):
        with pytest.raises(ConfigError, match="add --plan"):
            read_plan_request([flag], 1)


def test_a_world_size_that_is_no_number_is_refused() -> None:
    for text in ("many", "0", "-1", ""):
        with pytest.raises(ConfigError, match="expected a number of ranks"):
            read_plan_request(["--plan", f"--world-size={text}"], 1)


def test_the_plan_is_for_the_ranks_that_were_started_unless_told_otherwise() -> None:
    settings = ["--model.flavor", "8B"]
    request, rest = read_plan_request(["--plan", *settings], 3)
    assert request is not None
    assert (request.world_size, request.as_json, rest) == (3, False, settings)
    assert read_plan_request(settings, 3) == (None, settings)


def test_a_plan_is_checked_against_its_own_world_size(tmp_path: Path) -> None:
    found = run_train(
        "--plan", "--world-size", "6", "--parallelism.tensor_parallel_degree", "4",
        f"--job.dump_folder={tmp_path}",
    )  # fmt: skip
    assert found.returncode == 2
    assert "there are 6 ranks" in found.stderr


def test_keys_of_the_file_that_are_left_out_are_said_and_no_part_of_the_plan(
    tmp_path: Path,
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\nflavor = "byte_debug"\n[optimizer]\nbeta1 = 0.8\n')
    found = run_train(
        "--plan", "--json", "--job.config_file", str(file), "--optimizer.name", "SGD"
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stderr == f"{file}: optimizer.beta1 is not read by SGD: left out\n"
    assert "stages" in json.loads(found.stdout)
