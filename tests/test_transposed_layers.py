"""The Conv1D of transformers is a linear layer whose weight is stored transposed."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.support.layer_layouts import OPTIONS, ddp, fsdp, fsdp_over_columns, train, values, whole
from tests.support.layer_models import Perceptron, made
from tests.support.ranks import run_on_ranks
from titan_shampoo import FOOF, KFAC, Eva, EvaF
from titan_shampoo.statistics import tap

METHODS: dict[str, Any] = {"Eva": Eva, "EvaF": EvaF, "FOOF": FOOF, "KFAC": KFAC}
VARIANTS: dict[str, dict[str, Any]] = {
    "joint": {},
    "separate": {"bias": "separate", "nesterov": True},
    "relative": {"damping_mode": "relative", "scaling": "norm", "momentum": 0.0},
    "unscaled": {"scaling": None, "damping": 0.3, "lr": 1e-3, "weight_decay_type": "l2"},
}
LAYOUTS: dict[str, tuple[int, Any]] = {
    "plain": (1, lambda model: (model, 0, 1)),
    "ddp": (2, ddp),
    "fsdp": (2, fsdp),
    "fsdp over columns": (2, fsdp_over_columns),
}


class Conv1D(nn.Module):
    """As in ``transformers.pytorch_utils``, which need not be installed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight)
        return x.view(size_out)


Conv1D.__module__ = "transformers.pytorch_utils"


class Transposed(Perceptron):
    """The same network with every linear layer that has a bias as a Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        for name, layer in list(self.named_children()):
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                other = Conv1D(layer.out_features, layer.in_features)
                other.weight = nn.Parameter(layer.weight.detach().T.contiguous())
                other.bias = layer.bias
                setattr(self, name, other)


def options_of(method: str, variant: str, layout: str) -> dict[str, Any]:
    options = OPTIONS | VARIANTS[variant]
    if method in ("FOOF", "KFAC"):
        options["precondition_frequency"] = 2
        if "fsdp" in layout:  # cuts inputs of some layers, of which a bias cannot be one then
            options["bias"] = "separate"
    return options


def trained(
    method: str, kind: type[nn.Module], layout: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Weights and state of vectors after some steps, of layers as linear layers have them."""
    model, reader, num_readers = LAYOUTS[layout][1](made(kind))
    optimizer = METHODS[method](model.named_parameters(), model=model, **options)
    train(model, optimizer, Perceptron, reader, num_readers)
    found = values(model)
    for name, state in optimizer.sharded_state().items():
        for key, value in state.items():
            if key in ("input_mean", "output_sum", "momentum"):
                found[f"{name.removeprefix('module.')}.{key}"] = whole(value)
    if kind is Perceptron:
        return found
    return {n: v.T if v.ndim == 2 and "back" not in n else v for n, v in found.items()}


def on_ranks(method: str, layout: str) -> dict[str, dict[str, Tensor]]:
    return {
        variant: trained(method, Transposed, layout, options_of(method, variant, layout))
        for variant in VARIANTS
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_iterates_are_those_of_linear_layers(method: str, layout: str) -> None:
    results = run_on_ranks(LAYOUTS[layout][0], on_ranks, method, layout)
    for variant in VARIANTS:
        options = options_of(method, variant, layout)
        wanted = trained(method, Perceptron, "plain", options)
        for result in results:
            found = result[variant]
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                error = (found[name] - value).norm() / value.norm().clamp(min=1e-30)
                assert error <= 1e-12, f"{method}, {variant}, {name}: {error:.1e}"


def refused_joint(method: str) -> str:
    model, *_ = fsdp(made(Transposed))
    with pytest.raises(ValueError, match="columns are cut") as error:
        METHODS[method](model.named_parameters(), model=model)
    return str(error.value)


@pytest.mark.parametrize("method", ["FOOF", "KFAC"])
def test_a_bias_beside_inputs_that_are_cut_is_refused_by_name(method: str) -> None:
    said = "first.weight: its columns are cut, so that its bias cannot be one of them; set "
    assert run_on_ranks(2, refused_joint, method) == [f"{said}bias='separate'"] * 2


def refused_under_tp() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    layer = Conv1D(4, 6)
    layer.weight = nn.Parameter(distribute_tensor(torch.zeros(6, 4), mesh, [Shard(0)]))
    assert isinstance(layer.weight, DTensor)
    with pytest.raises(ValueError, match="tensor parallelism") as error:
        tap(nn.ModuleDict({"fc": layer}))
    return str(error.value)


def test_under_tensor_parallelism_it_is_refused_by_name() -> None:
    (said, _) = run_on_ranks(2, refused_under_tp)
    assert said == (
        "fc: a transposed linear layer under tensor parallelism cannot be tapped; shard it with "
        "FSDP2 only, or leave it to the fallback in a parameter group with precondition = False"
    )
