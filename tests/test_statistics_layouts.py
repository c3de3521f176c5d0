"""Statistics of a sharded model, added up as its layers say, are those of one rank."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.support.ranks import run_on_ranks
from tests.support.reduced_statistics import reduced, sums_of
from titan_shampoo.statistics import TappedLayer, check_counts, tap

BATCH, LENGTH, WIDTH = 8, 4, 6


class Block(nn.Module):
    """Two layers on one input, and one behind them, as in a transformer."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 10)
        self.up = nn.Linear(WIDTH, 10, bias=False)
        self.down = nn.Linear(10, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).to(dtype)


def make_batch(dtype=torch.float64):
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(output):
    return output.sin().sum()


Sums = dict[str, dict[str, Tensor]]


def collected(model: nn.Module) -> list[TappedLayer]:
    layers = tap(model, moments="both")
    for layer in layers:
        layer.collects_moments = True
    return layers


@functools.cache
def expected(dtype=torch.float64) -> Sums:
    model = make_model(dtype)
    layers = collected(model)
    loss_of(model(make_batch(dtype))).backward()
    return {layer.name: sums_of(layer) for layer in layers}


def verify(model: nn.Module, batch: Tensor, layers=None, dtype=torch.float64, **tolerance) -> None:
    """Train ``model`` on this rank's part of the batch, and compare."""
    layers = layers or collected(model)
    assert [layer.name for layer in layers] == list(expected(dtype))
    loss_of(model(batch)).backward()
    check_counts(layers)
    for layer in layers:
        for name, value in reduced(layer).items():
            torch.testing.assert_close(value, expected(dtype)[layer.name][name], **tolerance)
        if layer.bias is not None:
            grad = layer.bias.grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            divided = reduced(layer)["output_sum"] / layer.sharding.gradient_divisor
            torch.testing.assert_close(divided, grad.to(divided.dtype), **tolerance)


def part_of(batch: Tensor, mesh: DeviceMesh, *axes: str) -> Tensor:
    for axis in axes:
        batch = batch.chunk(mesh[axis].size())[mesh[axis].get_local_rank()]
    return batch


def fsdp2_in_any_order():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    for order, wrap_layers in (("before", True), ("after", False), ("between", True)):
        model = make_model()
        if order == "before":
            tap(model, moments="both")
        for block in model:
            if order == "between":
                tap(model, moments="both")
            if wrap_layers:
                fully_shard(block.gate, mesh=mesh)
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        verify(model, part_of(make_batch(), mesh, "fsdp"), collected(model))


def test_fsdp2_in_any_order():
    run_on_ranks(2, fsdp2_in_any_order)


def fsdp2_sums():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    model = make_model()
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    with CommDebugMode() as communication:
        layers = collected(model)
    assert communication.get_total_counts() == 0
    assert {layer.sharding.gradient_divisor for layer in layers} == {1.0}
    verify(model, part_of(make_batch(), mesh, "fsdp"), layers)


def test_gradient_divisor_is_that_of_fsdp2_and_tapping_communicates_nothing():
    run_on_ranks(2, fsdp2_sums)


def fsdp2_from_meta():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    with torch.device("meta"):
        model = make_model()
    layers = collected(model)
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh)
    model.to_empty(device="cpu")
    whole = make_model().state_dict()
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        shard = whole[name].chunk(2)[dist.get_rank()]
        param.to_local().data.copy_(shard)
    with pytest.raises(
        RuntimeError, match=r"0\.gate: tapped on meta, called on cpu; tap the model"
    ):
        model(make_batch())
    for unit in (*model, model):
        unit.reshard()
    layers = collected(model)
    verify(model, part_of(make_batch(), mesh, "fsdp"), layers)


def test_model_tapped_on_meta_is_tapped_again_once_it_is_real():
    run_on_ranks(2, fsdp2_from_meta)


def fsdp2_bf16():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    model = make_model(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    layers = collected(model)
    batch = part_of(make_batch(torch.float32), mesh, "fsdp")
    verify(model, batch, layers, torch.float32, rtol=0.05, atol=0.15)
    for layer in layers:
        assert {value.dtype for value in sums_of(layer).values()} == {torch.float32}
    # The first layer's input is the batch itself: its sum has no more error than bf16 inputs.
    exact = batch.bfloat16().double().sum((0, 1))
    torch.testing.assert_close(layers[0].input_sum[:-1].double(), exact, rtol=1e-6, atol=1e-5)


def test_sums_of_bf16_activations_are_float32():
    run_on_ranks(2, fsdp2_bf16)


def fsdp2_evaluated():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    model = make_model()
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=False)
    layers = collected(model)
    params = [param for layer in layers for param in (layer.weight, layer.bias)]
    with torch.no_grad():
        model(make_batch())
    assert not isinstance(model[0].gate.weight, DTensor)  # what this test is about
    layers = collected(model)
    assert [param for layer in layers for param in (layer.weight, layer.bias)] == params
    verify(model, part_of(make_batch(), mesh, "fsdp"), layers)


def test_evaluation_under_fsdp2_does_not_change_which_parameters_layers_have():
    run_on_ranks(2, fsdp2_evaluated)


def hsdp_2x2():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "fsdp"))
    model = make_model()
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh)
    layers = collected(model)
    assert {layer.sharding.row_axes for layer in layers} == {(0, 1)}
    verify(model, part_of(make_batch(), mesh, "dp_replicate", "fsdp"), layers)


def test_hsdp():
    run_on_ranks(4, hsdp_2x2)


def ddp2():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    batch = part_of(make_batch(), mesh, "dp")
    for wrap in (
        nn.parallel.DistributedDataParallel,
        functools.partial(replicate, device_mesh=mesh),
    ):
        model = wrap(make_model())
        layers = collected(model)
        assert [layer.name for layer in layers] == list(expected())
        assert {layer.sharding.gradient_divisor for layer in layers} == {2.0}
        loss_of(model(batch)).backward()
        for layer in collected(model):
            assert layer.sharding.gradient_divisor == 2.0
            for name, value in sums_of(layer).items():
                dist.all_reduce(value)
                torch.testing.assert_close(value, expected()[layer.name][name])


def test_ddp():
    run_on_ranks(2, ddp2)


def tensor_parallel(model: nn.Sequential, mesh: DeviceMesh, sequence: bool) -> None:
    outside = Shard(1) if sequence else Replicate()
    plan = {
        "gate": ColwiseParallel(input_layouts=outside),
        "up": ColwiseParallel(input_layouts=outside),
        "down": RowwiseParallel(output_layouts=outside),
    }
    for block in model:
        parallelize_module(block, mesh, plan)


def tp2(sequence, wrap):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = make_model()
    tensor_parallel(model, mesh, sequence)
    for name, block in list(model.named_children()):
        model.register_module(name, WRAPS[wrap](block))
    batch = make_batch()
    if sequence:
        batch = batch.chunk(2, dim=1)[mesh.get_local_rank()].contiguous()
    layers = collected(model)
    gate, up, down = layers[:3]
    assert gate.sharding.output_axes == up.sharding.output_axes == (0,)
    assert down.sharding.input_axes == (0,)
    assert gate.input_sum.shape == (7,)
    assert gate.output_sum.shape == (5,)
    assert down.input_sum.shape == (6,)
    verify(model, batch, layers)


def compiled(block: nn.Module) -> nn.Module:
    block.compile(fullgraph=True, backend="aot_eager")
    return block


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda block: block,
    "checkpointed": checkpoint_wrapper,
    "compiled": compiled,
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("sequence", [False, True], ids=["tokens", "sequence"])
def test_tensor_parallel(sequence, wrap):
    run_on_ranks(2, tp2, sequence, wrap)


def fsdp2_tp2():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    for sequence in (False, True):
        model = make_model()
        tensor_parallel(model, mesh["tp"], sequence)
        for unit in (*model, model):
            fully_shard(unit, mesh=mesh["fsdp"])
        batch = part_of(make_batch(), mesh, "fsdp")
        if sequence:
            batch = batch.chunk(2, dim=1)[mesh["tp"].get_local_rank()].contiguous()
        layers = collected(model)
        assert {layer.sharding.row_axes for layer in layers} == {(0,)}
        verify(model, batch, layers)


def test_fsdp2_times_tensor_parallel():
    run_on_ranks(4, fsdp2_tp2)


def rows_cut_over_tp():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    layer = nn.Linear(4, 4)
    parallelize_module(layer, mesh, ColwiseParallel())
    tap(layer)
    weight = layer.weight
    cut = DTensor.from_local(torch.randn(2, 4), mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"its input is placed as .*want whole rows"):
        layer.forward(cut)
    assert weight is layer.weight


def test_rows_cut_over_a_tensor_parallel_axis_are_refused():
    run_on_ranks(2, rows_cut_over_tp)


def zero_bubble():
    rank = dist.get_rank()
    torch.manual_seed(0)
    parts = [Block().double() for _ in range(4)][rank::2]
    layers = [tap(part) for part in parts]
    stages: list[_PipelineStageBase] = [
        PipelineStage(part, rank + 2 * chunk, 4, torch.device("cpu"))
        for chunk, part in enumerate(parts)
    ]
    schedule = ScheduleInterleavedZeroBubble(
        stages, 4, loss_fn=lambda output, target: loss_of(output), scale_grads=False
    )
    if rank == 0:
        schedule.step(make_batch())
    else:
        schedule.step(target=make_batch())
    with pytest.raises(RuntimeError, match="its tap saw no rows"):
        check_counts(layers[1])


def test_zero_bubble_schedules_skip_taps_which_the_check_of_the_first_step_finds():
    run_on_ranks(2, zero_bubble)


def pp2():
    whole, rank = make_model(), dist.get_rank()
    part = whole[rank]
    layers = collected(part)
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(
        stage, 4, loss_fn=lambda output, target: loss_of(output), scale_grads=False
    )
    batch = make_batch()
    for _ in range(2):
        for layer in layers:
            layer.reset()
        if rank == 0:
            schedule.step(batch)
        else:
            schedule.step(target=batch)
    for layer in layers:
        for name, value in sums_of(layer).items():
            torch.testing.assert_close(value, expected()[f"{rank}.{layer.name}"][name])


def test_pipeline_1f1b_with_four_microbatches():
    run_on_ranks(2, pp2)
