"""What the taps of one layer measure, against loops over single rows."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import schedules
from torch.nn.utils.parametrizations import weight_norm

from tests.reference.statistics import conv_rows, linear_rows
from titan_shampoo.statistics import TappedLayer, check_counts, check_schedule, tap, untapped


def loss_of(output: Tensor) -> Tensor:
    """Nonlinear, and not the same for any two values."""
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype)
    return (output.tanh().flatten() * weights).sum()


def measured(module: nn.Module, inputs: Tensor) -> TappedLayer:
    (layer,) = tap(module, moments="both")
    layer.collects_moments = True
    loss_of(module(inputs)).backward()
    return layer


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (2, 2, 2, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_statistics_are_those_of_its_rows(shape, bias):
    torch.manual_seed(0)
    module = nn.Linear(7, 5, bias=bias, dtype=torch.float64)
    inputs = torch.randn(shape, dtype=torch.float64)
    rows, grads = linear_rows(module, inputs, loss_of)
    layer = measured(module, inputs)
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    extended = torch.cat([rows, ones], dim=1)
    torch.testing.assert_close(layer.input_sum, extended.sum(0))
    torch.testing.assert_close(layer.output_sum, grads.sum(0))
    rows = extended if bias else rows
    torch.testing.assert_close(layer.input_moment, sum(torch.outer(x, x) for x in rows))
    torch.testing.assert_close(layer.output_moment, sum(torch.outer(g, g) for g in grads))
    if bias:
        torch.testing.assert_close(layer.output_sum, module.bias.grad)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.Conv2d(6, 5, 3)])
def test_output_gradients_that_nobody_wants_are_not_summed(make):
    torch.manual_seed(0)
    module = make()
    inputs = torch.randn(2, 6, 6, 6)
    with_all = measured(copy.deepcopy(module), inputs)
    (layer,) = tap(module, output_sums=False)
    loss_of(module(inputs)).backward()
    assert layer.leaves.output is None
    assert torch.equal(layer.input_sum, with_all.input_sum)
    torch.testing.assert_close(layer.weight.grad, with_all.weight.grad, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"tapped without sums .*output_sums=True"):
        layer.output_sum  # noqa: B018


CONVOLUTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "stride": {"stride": (2, 1), "padding": 1},
    "padding": {"padding": (2, 1)},
    "dilation": {"dilation": (1, 2), "padding": 2},
    "same": {"padding": "same", "dilation": (2, 1), "kernel_size": (2, 3)},
    "valid": {"padding": "valid", "stride": 2},
    "groups": {"groups": 2, "padding": 1},
    "groups-no-bias": {"groups": 2, "bias": False, "stride": 2},
    "depthwise": {"groups": 4, "padding": 1},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "groups": 2},
    "circular": {"padding": (1, 2), "padding_mode": "circular", "stride": 2},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution_statistics_are_those_of_its_patches(options):
    torch.manual_seed(0)
    options = {"kernel_size": (3, 2), "dtype": torch.float64} | options
    module = nn.Conv2d(4, 8, **options)
    images = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    patches, grads = conv_rows(module, images, loss_of)
    layer = measured(module, images)
    mean_over_groups = patches.mean(1)
    torch.testing.assert_close(layer.input_sum[:-1], mean_over_groups.sum(0))
    assert layer.input_sum[-1] == len(patches)
    torch.testing.assert_close(layer.output_sum, grads.sum(0))
    moment = torch.zeros(patches.shape[-1], patches.shape[-1], dtype=torch.float64)
    for row in patches:
        for patch in row:
            moment += torch.outer(patch, patch) / len(row)
    torch.testing.assert_close(layer.output_moment, sum(torch.outer(g, g) for g in grads))
    if module.bias is None:
        torch.testing.assert_close(layer.input_moment, moment)
    else:
        assert layer.input_moment is not None
        torch.testing.assert_close(layer.output_sum, module.bias.grad)
        torch.testing.assert_close(layer.input_moment[:-1, :-1], moment)
        torch.testing.assert_close(layer.input_moment[-1], layer.input_sum)
        torch.testing.assert_close(layer.input_moment[:, -1], layer.input_sum)


def train(model: nn.Module, batch: Tensor) -> None:
    loss_of(model(batch)).backward()


def names(layers: list[TappedLayer]) -> list[str]:
    return [layer.name for layer in layers]


def test_sums_accumulate_until_they_are_reset():
    module = nn.Linear(3, 2)
    (layer,) = tap(module)
    batch = torch.randn(5, 3)
    train(module, batch)
    once = layer.input_sum.clone(), layer.output_sum.clone()
    train(module, batch)
    torch.testing.assert_close((layer.input_sum, layer.output_sum), (2 * once[0], 2 * once[1]))
    layer.reset()
    assert not layer.input_sum.any()
    assert not layer.output_sum.any()
    train(module, batch)
    torch.testing.assert_close((layer.input_sum, layer.output_sum), once)


def test_evaluation_counts_nothing():
    module = nn.Linear(3, 2)
    (layer,) = tap(module)
    with torch.no_grad():
        module(torch.randn(5, 3))
    with torch.inference_mode():
        module(torch.randn(5, 3))
    module(torch.randn(5, 3))  # never differentiated
    assert layer.input_sum[-1] == 0
    train(module, torch.randn(4, 3))
    assert layer.input_sum[-1] == 4


def test_unused_layer_has_zeros_and_passes_the_check():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    layers = tap(model, moments="both")
    for layer in layers:
        layer.collects_moments = True
    train(model["used"], torch.randn(5, 3))
    unused = layers[1]
    for value in (unused.input_sum, unused.output_sum, unused.input_moment, unused.output_moment):
        assert value is not None
        assert not value.any()
    check_counts(layers)


def test_shared_module_adds_up_its_calls():
    torch.manual_seed(0)
    shared = nn.Linear(3, 3, dtype=torch.float64)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    (layer,) = tap(model)
    train(model, torch.randn(5, 3, dtype=torch.float64))
    assert layer.name == "0"
    assert layer.input_sum[-1] == 10
    torch.testing.assert_close(layer.output_sum, shared.bias.grad)


def test_tied_parametrized_and_skipped_layers_are_left_out_and_frozen_ones_are_not():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(4, 3),
            "head": nn.Linear(3, 4, bias=False),
            "frozen": nn.Linear(3, 3).requires_grad_(False),
            "normalized": weight_norm(nn.Linear(3, 3)),
            "router": nn.Linear(3, 3),
            "conv1d": nn.Conv1d(3, 3, 1),
            "kept": nn.Linear(3, 3),
        }
    )
    model["head"].weight = model["embedding"].weight
    assert names(tap(model, skip=lambda name: name == "router")) == ["frozen", "kept"]


def test_frozen_layers_are_left_out_of_the_graph_until_they_are_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].requires_grad_(False)
    frozen, trained = tap(model)
    rows = torch.randn(5, 3, dtype=torch.float64)
    assert not model[0](rows).requires_grad
    train(model, rows)
    assert [float(one.input_sum[-1]) for one in (frozen, trained)] == [0, 5]
    model[0].requires_grad_(True)
    train(model, rows)
    assert [float(one.input_sum[-1]) for one in (frozen, trained)] == [5, 10]
    torch.testing.assert_close(frozen.output_sum, model[0].bias.grad)


def test_a_frozen_layer_that_cannot_be_tapped_is_left_out():
    model = nn.ModuleDict({"hooked": nn.Linear(3, 3), "kept": nn.Linear(3, 3)})
    model["hooked"].forward = lambda rows: rows
    with pytest.raises(ValueError, match="hooked: its forward was replaced"):
        tap(model)
    model["hooked"].requires_grad_(False)
    assert names(tap(model)) == ["kept"]


def test_reasons_are_given_for_what_is_left_out():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(2, 4, 3))

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 3))

    Foreign.__name__, Foreign.__module__ = "Linear", "elsewhere"
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(4, 3),
            "head": nn.Linear(3, 4),
            "router": nn.Linear(3, 3),
            "experts": Experts(),
            "conv1d": nn.Conv1d(3, 3, 1),
            "parametrized": weight_norm(nn.Linear(3, 3)),
            "attention": nn.MultiheadAttention(4, 2),
            "foreign": Foreign(),
            "norm": nn.LayerNorm(3),
            "frozen": nn.Linear(3, 3).requires_grad_(False),
            "kept": nn.Linear(3, 3),
        }
    )
    model["head"].weight = model["embedding"].weight
    layers = tap(model, skip=lambda name: name == "router")
    assert untapped(model, layers) == {
        "embedding.weight": "is shared by 2 modules",
        "head.weight": "is shared by 2 modules",
        "router.weight": "was skipped",
        "experts.w1": "belongs to Experts, and only nn.Linear, nn.Conv2d and the Conv1D of "
        "transformers can be tapped; if it is a stack of matrices (n, d_out, d_in), Eva, EvaF and "
        "EvaS take each of them in a parameter group with batch_dims = 1",
        "conv1d.weight": "belongs to nn.Conv1d, and only nn.Linear, nn.Conv2d and the Conv1D of "
        "transformers can be tapped",
        "parametrized.parametrizations.weight.original0": "is not a weight itself: a "
        "parametrization (as weight norm) forms one from it",
        "parametrized.parametrizations.weight.original1": "is not a weight itself: a "
        "parametrization (as weight norm) forms one from it",
        "attention.in_proj_weight": "is multiplied inside nn.MultiheadAttention, which calls no "
        "layer for it",
        "attention.out_proj.weight": "is multiplied inside nn.MultiheadAttention, which calls no "
        "layer for it",
        "foreign.weight": "belongs to elsewhere.Linear, and only nn.Linear, nn.Conv2d and the "
        "Conv1D of transformers can be tapped",
    }


def test_schedules_with_split_backward_passes_are_refused():
    for split in (schedules.ScheduleInterleavedZeroBubble, "ZBVZeroBubble", "DualPipeV"):
        with pytest.raises(ValueError, match="use 1F1B or Interleaved1F1B"):
            check_schedule(split)
    for full in (schedules.Schedule1F1B, schedules.ScheduleInterleaved1F1B, "GPipe"):
        check_schedule(full)


def test_nothing_but_the_forward_of_the_layers_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    batch = torch.randn(2, 3, 4, 4)
    before = copy.deepcopy(model)
    train(before, batch)
    layers = tap(model, moments="both")
    for layer in layers:
        layer.collects_moments = True
    train(model, batch)
    assert list(model.state_dict()) == list(before.state_dict())
    assert [name for name, _ in model.named_parameters()] == list(before.state_dict())
    assert torch.equal(model(batch), before(batch))
    for param, reference in zip(model.parameters(), before.parameters(), strict=True):
        assert param.grad is not None
        assert reference.grad is not None
        assert torch.equal(param.grad, reference.grad)


def test_nothing_is_kept_that_the_layers_do_not_keep():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(2), nn.Linear(4, 2))
    batch = torch.randn(2, 3, 4, 4)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    num_bytes = []
    for _ in range(2):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(batch)
        num_bytes.append({t.data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())
        del output
        tap(model, moments="both")
    assert sum(num_bytes[0]) == sum(num_bytes[1]) > 0


def test_copy_counts_for_itself():
    model = nn.Sequential(nn.Linear(3, 2))
    (layer,) = tap(model)
    twin = copy.deepcopy(model)
    train(twin, torch.randn(5, 3))
    assert layer.input_sum[-1] == 0
    (copied,) = tap(twin)
    assert copied.input_sum[-1] == 5


def test_pickled_model_works_untapped_and_can_be_tapped():
    model = nn.Sequential(nn.Linear(3, 2))
    tap(model)
    loaded = pickle.loads(pickle.dumps(model))
    batch = torch.randn(5, 3)
    assert torch.equal(loaded(batch), model(batch))
    (layer,) = tap(loaded)
    train(loaded, batch)
    assert layer.input_sum[-1] == 5


def test_tapping_twice_keeps_what_was_measured():
    module = nn.Linear(3, 2)
    (first,) = tap(module)
    train(module, torch.randn(5, 3))
    (second,) = tap(module, moments="input")
    second.collects_moments = True
    train(module, torch.randn(5, 3))
    assert first.input_sum[-1] == second.input_sum[-1] == 10
    assert second.input_moment is not None
    assert second.input_moment[-1, -1] == 5


def test_output_may_be_changed_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    layers = tap(model)
    train(model, torch.randn(5, 3, dtype=torch.float64))
    for layer in layers:
        assert layer.bias is not None
        torch.testing.assert_close(layer.output_sum, layer.bias.grad)


def test_subclass_keeps_its_own_forward_and_keyword_arguments():
    class Scaled(nn.Linear):
        def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(input) * scale

    module = Scaled(3, 2)
    (layer,) = tap(module)
    batch = torch.randn(5, 3)
    torch.testing.assert_close(module(input=batch, scale=2.0), 2 * module(batch))
    train(module, batch)
    assert layer.input_sum[-1] == 5


def test_autocast_and_bf16_sums_are_float32():
    module = nn.Linear(3, 2)
    (layer,) = tap(module, moments="both")
    layer.collects_moments = True
    with torch.autocast("cpu", torch.bfloat16):
        output = module(torch.ones(1000, 3))
    output.float().sum().backward()
    assert layer.input_sum.tolist() == [1000.0] * 4  # in bf16 the sum would stop at 256
    assert layer.output_sum.tolist() == [1000.0] * 2
    for value in (layer.input_sum, layer.output_sum, layer.input_moment, layer.output_moment):
        assert value is not None
        assert value.dtype == torch.float32
        assert value.min() == value.max() == 1000.0


def test_weight_with_a_gradient_whose_tap_saw_nothing_is_refused():
    module = nn.Linear(3, 2)
    late = nn.functional.linear(torch.randn(5, 3), module.weight)
    layers = tap(module)
    late.sum().backward()
    with pytest.raises(RuntimeError, match="its weight has a gradient, but its tap saw no rows"):
        check_counts(layers)


def test_unexpected_number_of_rows_is_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    layers = tap(model)
    train(model, torch.randn(5, 3))
    check_counts(layers, expected_rows={"0": 5})
    check_counts(layers, counts=[10], expected_rows={"0": 10})
    with pytest.raises(RuntimeError, match="0: its tap saw 5 rows, want 6"):
        check_counts(layers, expected_rows={"0": 6})


def test_forward_replaced_on_the_instance_is_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="0: its forward was replaced on the instance"):
        tap(model)


def test_moments_that_were_not_asked_for_are_refused():
    module = nn.Linear(3, 2)
    (layer,) = tap(module)
    with pytest.raises(ValueError, match="tapped without moments"):
        layer.collects_moments = True
    with pytest.raises(ValueError, match="moments: got 'output', want one of none, input, both"):
        tap(module, moments="output")  # type: ignore[arg-type]


def test_model_that_has_moved_since_is_refused():
    model = nn.Sequential(nn.Linear(3, 2, device="meta"))
    tap(model)
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="0: tapped on meta, called on cpu; tap the model"):
        model(torch.randn(5, 3))
