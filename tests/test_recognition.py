"""Embeddings, tables, output heads and routers are left to the fallback; projections never are."""

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from titan_shampoo import FOOF, KFAC, SOAP, Eva, EvaF, EvaS, KLShampoo, Shampoo
from titan_shampoo.recognition import kinds_of, reason_not_multiplied

METHODS: dict[str, Any] = {
    "Shampoo": Shampoo, "SOAP": SOAP, "KLShampoo": KLShampoo, "EvaS": EvaS,
    "Eva": Eva, "EvaF": EvaF, "FOOF": FOOF, "KFAC": KFAC,
}  # fmt: skip
TAPPED = ("Eva", "EvaF", "FOOF", "KFAC")
every_method = pytest.mark.parametrize("method", METHODS)
every_tapped_method = pytest.mark.parametrize("method", TAPPED)

LEFT = """
    tok_embeddings.weight model.embed_tokens.weight transformer.wte.weight
    transformer.wpe.weight gpt_neox.embed_in.weight embed_out.weight shared.weight
    model.shared.weight encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
    bert.embeddings.word_embeddings.weight vit.embeddings.position_embeddings pos_embed
    cls_token tok_emb.weight pos_emb class_token encoder.pos_embedding absolute_pos_embed
    lut.weight layers.0.blocks.0.attn.relative_position_bias_table backbone.embedding.weight
    backbone.layers.0.mixer.A_log decoder.token_embedding.weight decoder.positional_embedding
    y_embedder.embedding_table.weight qformer.query_tokens lm_head.weight output.weight
    head.weight score.weight classifier.weight head.fc.weight heads.head.weight
    classifier.out_proj.weight cls.predictions.decoder.weight qa_outputs.weight
    layers.0.mlp.gate.weight layers.0.moe.router.gate.weight
    layers.0.block_sparse_moe.gate.weight router.weight lm_head._orig_mod.weight
    model.module.lm_head.weight head_dist.weight
    base_model.model.score.modules_to_save.default.weight
"""

PRECONDITIONED = """
    patch_embed.proj.weight patch_embed.weight vision_model.embeddings.patch_embedding.weight
    vit.embeddings.patch_embeddings.projection.weight x_embedder.proj.weight
    t_embedder.mlp.0.weight blocks.0.adaLN_modulation.1.weight final_layer.linear.weight
    layers.0.attention.wq.weight layers.0.feed_forward.w1.weight layers.0.mlp.gate_proj.weight
    h.0.attn.c_attn.weight h.0.mlp.c_fc.weight encoder.block.0.layer.1.DenseReluDense.wi.weight
    bert.encoder.layer.0.attention.output.dense.weight bert.pooler.dense.weight text_projection
    visual_projection.weight layers.0.mixer.in_proj.weight layers.0.mixer.dt_proj.weight
    layers.0.mixer.conv1d.weight encoder.conv1.weight layer1.0.conv1.weight fc.weight
    embed_proj.weight layers.0.attn.head.weight classifier.dense.weight experts.w1
    attn.in_proj_weight transformer_blocks.0.proj_out.weight
"""


def reason(name: str, *shape: int, **options: Any) -> str | None:
    return reason_not_multiplied(name, torch.empty(shape or (64, 64), device="meta"), options)


@pytest.mark.parametrize("name", LEFT.split())
def test_names_of_the_usual_models_are_left_to_the_fallback(name: str) -> None:
    assert reason(name) is not None


@pytest.mark.parametrize("name", PRECONDITIONED.split())
def test_projections_of_the_usual_models_are_preconditioned(name: str) -> None:
    assert reason(name) is None


@pytest.mark.parametrize("shape", [(32128, 512), (50257, 768), (256000, 3072)])
def test_a_very_tall_matrix_is_a_table(shape: tuple[int, int]) -> None:
    assert reason("a.weight", *shape) == reason("7", *shape) == "table by its shape"
    assert reason("a.weight", *shape, precondition=True) is None


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.attention.wkv_b.weight", (32768, 512)),  # DeepSeek
        ("encoder.block.0.wi.weight", (65536, 1024)),  # T5-11B
        ("layers.0.feed_forward.w1.weight", (53248, 16384)),  # Llama 405B
        ("mlp.weight", (16384, 1024)),
        ("conv.weight", (32128, 1, 16, 16)),
        ("first.weight", (512, 32128)),
    ],
)
def test_projections_are_not_so_tall(name: str, shape: tuple[int, ...]) -> None:
    assert reason(name, *shape) is None


class Net(nn.Module):
    """Modules whose names say nothing, or the wrong thing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(11, 4)
        self.bag = nn.EmbeddingBag(5, 4)
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 11)})])
        self.down = nn.Linear(11, 4)
        self.last = nn.Linear(4, 11)
        self.tied = nn.Linear(4, 11, bias=False)
        self.tied.weight = self.a.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(self.a(tokens) + self.bag(tokens[:, None] % 5))
        up: Any = self.layers[0]
        hidden = hidden + self.down(torch.tanh(up["up"](hidden)))
        return self.last(hidden) + self.tied(hidden)


def preconditioned(optimizer: Any, model: nn.Module) -> set[str]:
    """Names of the weights that the method itself steps."""
    return {
        name
        for name, param in model.named_parameters()
        if param.ndim > 1 and optimizer.preconditions(param)
    }


BY_MODULE = {"embed.weight", "layers.0.up.weight", "down.weight"}


@every_method
def test_modules_tell_embeddings_and_heads_whatever_their_names(method: str) -> None:
    model = Net()
    optimizer = METHODS[method](model.named_parameters(), model=model)
    assert preconditioned(optimizer, model) == BY_MODULE


@every_method
def test_without_names_the_model_gives_them(method: str, recwarn: Any) -> None:
    model = Net()
    groups = [{"params": list(model.parameters())[:4]}, {"params": list(model.parameters())[4:]}]
    optimizer = METHODS[method](groups, model=model)
    assert preconditioned(optimizer, model) == BY_MODULE
    assert "down.weight" in optimizer.sharded_state()
    assert not recwarn.list


@pytest.mark.parametrize("method", [m for m in METHODS if m not in TAPPED])
def test_without_a_model_names_decide(method: str) -> None:
    model = Net()
    optimizer = METHODS[method](model.named_parameters())
    assert preconditioned(optimizer, model) == {
        "a.weight", "bag.weight", "layers.0.up.weight", "down.weight", "last.weight",
    }  # fmt: skip


@every_method
def test_a_group_says_what_is_preconditioned(method: str) -> None:
    model = Net()
    named = dict(model.named_parameters())
    all_of = {"params": [("last.weight", named.pop("last.weight"))], "precondition": True}
    none_of = {"params": [("down.weight", named.pop("down.weight"))], "precondition": False}
    groups = [all_of, none_of, {"params": list(named.items())}]
    optimizer = METHODS[method](groups, model=model)
    assert preconditioned(optimizer, model) == BY_MODULE - {"down.weight"} | {"last.weight"}


@every_method
def test_an_impossible_choice_is_refused(method: str) -> None:
    model = Net()
    group = {"params": list(model.named_parameters()), "precondition": "all"}
    with pytest.raises(ValueError, match=r"^precondition: got 'all', wanted one of"):
        METHODS[method]([group], model=model)


def test_without_a_fallback_everything_is_preconditioned() -> None:
    model = Net()
    optimizer = Shampoo(model.named_parameters(), model=model, fallback=None)
    assert all(optimizer.preconditions(param) for param in model.parameters())


@pytest.mark.parametrize("method", ["Shampoo", "SOAP", "KLShampoo", "EvaS"])
def test_copies_and_added_groups_recognise_the_same(method: str) -> None:
    model = Net()
    named = list(model.named_parameters())
    optimizer = METHODS[method](named[3:], model=model)
    optimizer.add_param_group({"params": named[:3]})
    assert preconditioned(optimizer, model) == BY_MODULE
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        named = [pair for g in other.param_groups
                 for pair in zip(g["param_names"], g["params"], strict=True)]  # fmt: skip
        found = {n for n, p in named if p.ndim > 1 and other.preconditions(p)}
        assert found == BY_MODULE


@pytest.mark.parametrize("method", ["Shampoo", "FOOF"])
def test_a_stage_knows_the_modules_of_the_other_stages(method: str) -> None:
    whole = Net()
    stage = nn.ModuleDict({"last": whole.last, "down": whole.down})
    optimizer = METHODS[method](stage.named_parameters(), model=stage, all_params=whole)
    assert preconditioned(optimizer, stage) == {"down.weight"}


def test_kinds_are_those_of_shared_weights() -> None:
    model = Net()
    assert kinds_of([model])[model.tied.weight] == "embedding"


# What is said


@every_method
def test_what_each_parameter_gets_is_said_once(method: str, caplog: Any) -> None:
    model = Net()
    with caplog.at_level(logging.INFO, "titan_shampoo"):
        METHODS[method](model.named_parameters(), model=model)
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    mine = 6 if method in TAPPED else 3  # a tapped method takes biases along
    numbers = 4 * 4 + 2 * 4 * 11 + (0 if mine == 3 else 4 + 11 + 4)
    vectors = 1 if mine == 6 else 4
    assert line == (
        f"{method} steps {mine} of 10 parameters ({numbers} numbers); AdamW the others "
        "(embedding by its module: a.weight, bag.weight; output head by its module: last.weight; "
        f"vector: {vectors})"
    )


class Words(nn.Module):
    """A network without any layer that can be tapped."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(5)])
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, rows: Tensor) -> Tensor:
        for weight in self.weights:
            rows = rows @ weight
        return self.conv(rows.mT)


@every_tapped_method
def test_a_network_without_layers_is_warned_of_once(method: str, caplog: Any) -> None:
    model = Words()
    METHODS[method](model.named_parameters(), model=model)
    (line,) = [r.getMessage() for r in caplog.records]
    tapped = "and only nn.Linear, nn.Conv2d and the Conv1D of transformers can be tapped"
    assert line == (
        f"{method}: AdamW steps everything, as no layer can be tapped: weights.0, weights.1, "
        f"weights.2 and 2 more: it belongs to nn.ParameterList, {tapped}; conv.weight: it belongs "
        f"to nn.Conv1d, {tapped}; Shampoo, SOAP, KLShampoo and EvaS need no layers"
    )


@every_tapped_method
def test_parameters_of_another_model_are_said_to_be_so(method: str, caplog: Any) -> None:
    METHODS[method](nn.Linear(4, 4).named_parameters(), model=nn.Linear(4, 4))
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == (
        f"{method}: AdamW steps everything, as no layer can be tapped: weight: it is not a "
        "parameter of the model; give the model that it is in, as it is now; Shampoo, SOAP, "
        "KLShampoo and EvaS need no layers"
    )


@pytest.mark.parametrize("method", ["Eva", "EvaF"])
def test_a_stack_that_is_not_seen_has_a_cause_of_its_own(method: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(2, 4, 3))

        def forward(self, rows: Tensor) -> Tensor:
            return torch.einsum("ni,eoi->neo", rows, self.w1)

    model = Experts()
    group = {"params": list(model.named_parameters()), "batch_dims": 1}
    optimizer = METHODS[method]([group], model=model)
    backward(model, 5, 3)
    with pytest.raises(RuntimeError, match=r"^w1: .* otherwise than by matmul, .*\(as by einsum\)"):
        optimizer.step()


class Attending(nn.Module):
    """A transformer of torch's, a parametrized layer and one whose weight is used without it."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.normalized = weight_norm(nn.Linear(8, 8))
        self.used = nn.Linear(8, 8)
        self.functional = functional

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.normalized(self.encoder(rows))
        if self.functional:
            return nn.functional.linear(hidden, self.used.weight)
        return self.used(hidden)


def backward(model: nn.Module, *shape: int) -> None:
    model.zero_grad()
    torch.manual_seed(0)
    model(torch.randn(*shape)).square().mean().backward()


@every_tapped_method
def test_a_transformer_encoder_trains_and_what_cannot_be_tapped_is_said(
    method: str, caplog: Any
) -> None:
    model = Attending()
    optimizer = METHODS[method](model.named_parameters(), model=model)
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == (
        f"{method}: AdamW steps what cannot be tapped: encoder.layers.0.self_attn.in_proj_weight, "
        "encoder.layers.0.self_attn.out_proj.weight, encoder.layers.1.self_attn.in_proj_weight and "
        "1 more: it is multiplied inside nn.MultiheadAttention, which calls no layer for it; "
        "normalized.parametrizations.weight.original0, normalized.parametrizations.weight."
        "original1: it is not a weight itself: a parametrization (as weight norm) forms one from "
        "it; Shampoo, SOAP, KLShampoo and EvaS need no layers, and precondition = False in a "
        "parameter group says that it is meant"
    )
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        backward(model, 2, 5, 8)
        optimizer.step()
        model.eval()
        with torch.no_grad():  # the fast path, which calls no layer
            model(torch.randn(2, 5, 8))
        model.train()
    for name, value in model.state_dict().items():
        if name != "encoder.layers.0.self_attn.in_proj_bias":
            assert not torch.equal(value, before[name]), name
    assert optimizer.preconditions(model.encoder.layers[0].linear1.weight)


@every_tapped_method
def test_what_is_meant_is_not_warned_of(method: str, caplog: Any) -> None:
    model = Attending()
    named = dict(model.named_parameters())
    meant = [name for name in named if "_proj" in name or "original" in name]
    groups = [
        {"params": [(name, named.pop(name)) for name in meant], "precondition": False},
        {"params": list(named.items())},
    ]
    METHODS[method](groups, model=model)
    assert not caplog.records


@every_tapped_method
def test_a_weight_used_without_its_layer_is_refused_in_every_step(method: str) -> None:
    model = Attending(functional=True)
    optimizer = METHODS[method](model.named_parameters(), model=model)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    for again in range(3):
        if again < 2:
            backward(model, 2, 5, 8)
        with pytest.raises(RuntimeError) as refused:
            optimizer.step()
        assert str(refused.value) == (
            "used.weight: has a gradient, but its inputs were not seen: others were; either its "
            "weight is used without calling its module, as by F.linear(x, layer.weight); call the "
            "module, or put the weight into a parameter group with precondition = False; or its "
            "gradient was set by hand; take a method that needs no layers (Shampoo, SOAP, "
            "KLShampoo, EvaS)"
        )
    after = model.state_dict(), optimizer.state_dict()["state"]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    for index, state in before[1].items():
        for key, value in state.items():
            assert torch.equal(after[1][index][key], value), (index, key)


@every_tapped_method
def test_such_a_weight_can_be_left_to_the_fallback(method: str) -> None:
    model = Attending(functional=True)
    named = dict(model.named_parameters())
    used = {"params": [("used.weight", named.pop("used.weight"))], "precondition": False}
    optimizer = METHODS[method]([used, {"params": list(named.items())}], model=model)
    before = model.used.weight.detach().clone()
    backward(model, 2, 5, 8)
    optimizer.step()
    assert not torch.equal(model.used.weight, before)


@every_tapped_method
def test_gradients_set_by_hand_are_refused_in_every_step(method: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = METHODS[method](model.named_parameters(), model=model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^0\.weight: .*nor were those of any other layer"):
            optimizer.step()
    backward(model, 3, 4)  # after zero_grad all is well
    optimizer.step()


def test_a_subclass_of_attention_that_calls_its_projection_is_tapped() -> None:
    class Calling(nn.MultiheadAttention):
        def forward(self, rows: Tensor) -> Tensor:  # type: ignore[override]
            return self.out_proj(rows)

    model = Calling(4, 2)
    optimizer = Eva(model.named_parameters(), model=model)
    assert preconditioned(optimizer, model) == {"out_proj.weight"}
