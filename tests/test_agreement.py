"""Ranks that are given different things are told so at construction, all of them, by one line."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.support.ranks import run_on_ranks
from titan_shampoo import FOOF, KFAC, SOAP, Eva, EvaF, EvaS, KLShampoo, Shampoo

METHODS: dict[str, Any] = {
    "Shampoo": Shampoo,
    "SOAP": SOAP,
    "KLShampoo": KLShampoo,
    "Eva": Eva,
    "EvaF": EvaF,
    "EvaS": EvaS,
    "FOOF": FOOF,
    "KFAC": KFAC,
}
WITH_MODEL = ("Eva", "EvaF", "FOOF", "KFAC")
PLAIN = "; give all ranks the same, or pass process_group: the ranks that hold plain tensors as "
PLAIN += "replicas"


class Matrix(nn.Module):
    """What no tap knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


def make(method: str, model: nn.Module, params: Any = None, **options: Any) -> Any:
    own = {"model": model} if method in WITH_MODEL else {}
    given = model.named_parameters() if params is None else params
    return METHODS[method](given, **own, **options)


def model_of(*sizes: int, bias: bool = True) -> Any:
    return nn.Sequential(*[nn.Linear(4, size, bias=bias) for size in sizes])


def second() -> bool:
    """Whether this is the rank that differs."""
    return dist.get_rank() == 1


def shape(method: str) -> None:
    make(method, model_of(4, 5 if second() else 4))


def dtype(method: str) -> None:
    make(method, model_of(4, 4).to(torch.float64 if second() else torch.float32))


def missing(method: str) -> None:
    make(method, model_of(*([4] if second() else [4, 4])))


def order(method: str) -> None:
    model = model_of(4, 4, bias=False)
    params = list(model.named_parameters())
    make(method, model, params[::-1] if second() else params)


def groups(method: str) -> None:
    first, *rest = model_params = list((model := model_of(4, 4, bias=False)).named_parameters())
    parts = [[first], rest] if second() else [model_params]
    make(method, model, [{"params": part} for part in parts])


def no_layer(method: str) -> None:
    model = nn.Sequential(Matrix() if second() else nn.Linear(4, 4, bias=False))
    make(method, model)


def only_fallback(method: str) -> None:
    """One rank has nothing to plan: by its options, vectors alone are left."""
    own = {"batch_dims": 1} if second() else {}
    make(method, model_of(4, bias=False), **own)


MISTAKES: dict[Callable[[str], None], str] = {
    shape: "1.weight: shape is (4, 4) on rank 0 and (5, 4) on rank 1",
    dtype: "0.weight: dtype is torch.float32 on rank 0 and torch.float64 on rank 1",
    missing: "1.weight: is on rank 0 and not on rank 1",
    order: "0.weight: rank 0 has it in the position of 1.weight on rank 1",
    groups: "1.weight: number of its parameter group is 0 on rank 0 and 1 on rank 1",
}


def refusal(mistake: Callable[..., object], *args: Any) -> str:
    try:
        mistake(*args)
    except ValueError as error:
        return str(error)
    return "no error"


def refusals(mistakes: Iterable[Callable[[str], None]], methods: Iterable[str]) -> dict[str, Any]:
    """The errors of some mistakes by method: ranks take longer to start than to make them."""
    return {method: [refusal(mistake, method) for mistake in mistakes] for method in methods}


def test_ranks_with_different_parameters_are_refused() -> None:
    sentences = [sentence + PLAIN for sentence in MISTAKES.values()]
    for found in run_on_ranks(2, refusals, list(MISTAKES), list(METHODS)):
        assert found == dict.fromkeys(METHODS, sentences)


def test_ranks_with_different_layers_are_refused() -> None:
    for found in run_on_ranks(2, refusals, [no_layer], WITH_MODEL):
        for method, (error,) in found.items():
            differing = f"'{method}' on rank 0 and 'adamw' on rank 1"
            assert error == f"0.weight: method that steps it is {differing}{PLAIN}"


@pytest.mark.parametrize("method", ["Shampoo", "EvaS"])
def test_a_rank_without_anything_to_precondition_is_refused(method: str) -> None:
    sentence = "0.weight: batch_dims is 0 on rank 0 and 1 on rank 1"
    assert run_on_ranks(2, refusal, only_fallback, method) == [sentence + PLAIN] * 2


OPTIONS: dict[str, dict[str, Any]] = {
    "Shampoo": {"communication_dtype": torch.bfloat16, "factor_dtype": torch.float64, "eps": 1e-3},
    "SOAP": {"precondition_frequency": 3, "max_skipped": 3},
    "KLShampoo": {"refresh": "together"},
    "Eva": {"scaling": "norm", "bias": "separate", "damping": 0.5, "lr": 0.5},
    "EvaF": {"kl_clip": 1.0, "damping_mode": "relative", "momentum": 0.0},
    "EvaS": {"merge": "none", "scaling": "kl_clip"},
    "FOOF": {"factor_frequency": 2, "max_factor_dim": 2},
    "KFAC": {"factored_damping": False, "precondition_frequency": 3},
}


def different_options() -> dict[tuple[str, str], str]:
    """The error for each option of each method that the second rank alone sets."""
    found = {}
    for method, options in OPTIONS.items():
        for key, value in options.items():
            own = {key: value} if second() else {}
            found[method, key] = refusal(lambda m, o: make(m, model_of(4), **o), method, own)
    return found


def test_ranks_with_different_options_are_refused() -> None:
    first, other = run_on_ranks(2, different_options)
    assert first == other
    for (method, key), error in first.items():
        usual = METHODS[method].__init__.__kwdefaults__ | {"lr": 0.1, "damping": 0.3, "eps": 1e-12}
        both = f"{usual[key]!r} on rank 0 and {OPTIONS[method][key]!r} on rank 1"
        assert error == f"0.weight: {key} is {both}{PLAIN}"


def rates_in_tensors(method: str) -> None:
    make(method, model_of(4), lr=torch.tensor(0.5 if second() else 0.25))


@pytest.mark.parametrize("method", ["Shampoo", "Eva"])
def test_rates_in_tensors_are_compared_by_value(method: str) -> None:
    sentence = "0.weight: lr is 0.25 on rank 0 and 0.5 on rank 1"
    assert run_on_ranks(2, refusal, rates_in_tensors, method) == [sentence + PLAIN] * 2


def placed(method: str, placements: list[Placement]) -> None:
    """One rank of a mesh of two axes places its weight otherwise."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model = model_of(4, bias=False)
    found = placements if second() else [Replicate(), Shard(0)]
    weight = distribute_tensor(model[0].weight.detach(), mesh, found, src_data_rank=None)
    model[0].weight = nn.Parameter(weight)
    make(method, model)


@pytest.mark.parametrize("placements", [[Shard(0), Replicate()], [Shard(0), Shard(1)]], ids=str)
@pytest.mark.parametrize("method", ["Shampoo", "Eva", "KFAC"])
def test_ranks_that_place_parameters_differently_are_refused(
    method: str, placements: list[Placement]
) -> None:
    found = run_on_ranks(4, refusal, placed, method, placements)
    assert len(set(found)) == 1
    usual, other = [Replicate(), Shard(0)], placements
    assert found[0] == (
        f"0.weight: placement is {(tuple(usual), (2, 2))} on rank 0 and {(tuple(other), (2, 2))} "
        "on rank 1; give all ranks the same"
    )


def half_of_the_ranks(method: str) -> None:
    """Weights of all ranks, and some of each half, one of which is wrong on one rank."""
    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("halves", "half"))["half"]
    model = model_of(4, 6 if second() else 4, bias=False)
    model[1].weight = nn.Parameter(
        distribute_tensor(model[1].weight.detach(), halves, [Shard(0)], src_data_rank=None)
    )
    make(method, model)


@pytest.mark.parametrize("method", ["Shampoo", "EvaS"])
def test_what_some_ranks_hold_alone_is_an_error_on_all(method: str) -> None:
    *holders, _, last = run_on_ranks(4, refusal, half_of_the_ranks, method)
    sentence = "1.weight: shape is (4, 4) on rank 0 and (6, 4) on rank 1; give all ranks the same"
    assert holders[:2] == [sentence] * 2
    assert last == "parameters or options of other ranks differ; see the errors of those ranks"


def stages(method: str, bare: bool, wrong: dict[int, dict[str, Any]]) -> str:
    """The error of two ranks in each of two stages, which hold different layers.

    Args:
        method: Its name.
        bare: Whether the second stage has no layers.
        wrong: Options of some ranks.
    """
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "replicas"))
    model = model_of(8, 4, 4)
    if world.get_local_rank("stages"):
        model = nn.Sequential(nn.LayerNorm(4)) if bare else model_of(4, 4)
    options = {
        "process_group": world["replicas"].get_group(),
        "pipeline_group": world["stages"].get_group(),
        **wrong.get(dist.get_rank(), {}),
    }
    return refusal(lambda: make(method, model, **options))


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("method", ["Shampoo", "Eva", "EvaS", "FOOF"])
def test_stages_of_a_pipeline_have_different_parameters(method: str, bare: bool) -> None:
    assert run_on_ranks(4, stages, method, bare, {}) == ["no error"] * 4


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    ("method", "key", "value"),
    [("Shampoo", "max_failures", 5), ("Eva", "scaling", "norm"), ("FOOF", "kl_clip", 1.0)],
)
def test_stages_that_step_differently_are_refused(
    method: str, bare: bool, key: str, value: Any
) -> None:
    usual = METHODS[method].__init__.__kwdefaults__[key]
    for rank, error in enumerate(
        run_on_ranks(4, stages, method, bare, {2: {key: value}, 3: {key: value}})
    ):
        ranks = f"{usual!r} on rank {rank % 2} and {value!r} on rank {rank % 2 + 2}"
        assert error == f"pipeline_group: {key} is {ranks}; give all stages the same"


@pytest.mark.parametrize("method", ["Shampoo", "Eva", "KFAC"])
def test_a_mistake_in_one_stage_is_an_error_in_all(method: str) -> None:
    wrong = {3: {"weight_decay": 0.5}}
    *others, third, last = run_on_ranks(4, stages, method, False, wrong)
    assert third == last == f"0.weight: weight_decay is 0.0 on rank 2 and 0.5 on rank 3{PLAIN}"
    assert (
        others == ["parameters or options of other ranks differ; see the errors of those ranks"] * 2
    )


def of_a_whole_model(method: str) -> None:
    """Only the second rank knows of larger layers before, which take the first turns."""
    model = model_of(4, bias=False)
    before = [("-1.weight", torch.empty(9, 9, device="meta"))] if second() else []
    params = [*before, ("0.weight", torch.empty(4, 4, device="meta"))]
    make(method, model, all_params=params)


@pytest.mark.parametrize("method", ["Shampoo", "FOOF"])
def test_ranks_that_know_another_whole_model_are_refused(method: str) -> None:
    sentence = (
        "0.weight: refresh slot and owner of block 0 is (0, 0, 0) on rank 0 and (1, 0, 0) on rank 1"
    )
    assert run_on_ranks(2, refusal, of_a_whole_model, method) == [sentence + PLAIN] * 2


def test_a_group_that_one_rank_adds_otherwise_is_refused_and_nothing_is_added() -> None:
    assert (
        run_on_ranks(2, added, "Eva") == [("0.bias: lr is 0.1 on rank 0 and 0.5 on rank 1", 1)] * 2
    )


def added(method: str) -> tuple[str, int]:
    model = model_of(4)
    weight, bias = model.named_parameters()
    optimizer = make(method, model, [weight])
    group = {"params": [bias], "lr": 0.5 if second() else 0.1}
    return refusal(optimizer.add_param_group, group).removesuffix(PLAIN), len(
        optimizer.param_groups
    )


def communication() -> dict[str, dict[str, int]]:
    """Collectives of the construction of each method, by kind."""
    found = {}
    for method in METHODS:
        model = model_of(4, 4)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        with CommDebugMode() as mode:
            make(method, model)
        found[method] = {str(kind): number for kind, number in mode.get_comm_counts().items()}
    return found


def test_construction_compares_hashes_and_communicates_nothing_else() -> None:
    for found in run_on_ranks(2, communication):
        assert found == {method: {"c10d.allreduce_": 2} for method in METHODS}
