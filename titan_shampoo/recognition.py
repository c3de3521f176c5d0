"""Selection of the matrices to precondition, with the reason for each that the fallback steps.

Rows of embeddings and tables are looked up, rows of output heads and routers are chosen. Their
row factor would be as large as the vocabulary, and Adam works as well. Modules of a known model
decide first, then names, then the shape. ``precondition`` of a group overrides all of them.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

Kind = Literal["embedding", "output head", "layer"]
"""Kind of a parameter by its module; a "layer" can still be a head or a router by its name."""

Model = nn.Module | Sequence[nn.Module]
"""A model, or the parts of a pipeline on this rank."""

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_PEFT = re.compile(r"(^|(?<=\.))modules_to_save\.\w+\.")
"""Parts of names that peft adds."""

# Last part of a name, with anything before its last underscore; projections are no tables.
_TABLES = re.compile(
    r"""(^|\.)(?!to_|[^.]*(patch|proj))([^.]*_)?(
      embed\w* | embs?                          # embed_tokens, tok_emb, pos_embed, word_embeddings
    | wte | wpe | lut                           # GPT-2; the annotated transformer
    | tokens?                                   # cls_token, register_tokens, query_tokens
    | relative_attention_bias | bias_table | rel_pos\w*            # T5, Swin, SAM
    | positions? | pos(itional)?_enc(odings?)? | latents? | codebooks?
    | A_log                                     # Mamba: an exponent for each entry
    )(\.weight)?$ | (^|\.)shared\.weight$       # T5
    """,
    re.VERBOSE,
)

_ROUTERS = re.compile(
    r"(^|\.)([^.]*_)?(router|gate|router\.(layer|linear|proj|classifier)|gate\.wg)\.weight$"
)

_HEADS = re.compile(r"(^|\.)([^.]*_)?(lm_head|output)\.weight$")

# Words that occur inside a network too: they mean a head only without a number before them.
_LAST_LAYERS = re.compile(
    r"""^(?!(.*\.)?\d+\.)(.*\.)?(
      ([^.]*_)?(head|score|classifier|logits) | head_dist | unembed\w* | qa_outputs
    | output_(layer|projection)
    | ([^.]*_)?(head|classifier|predictions)\.(out_proj|decoder|fc|proj|linear)
    )\.weight$
    """,
    re.VERBOSE,
)

_REPEATED = re.compile(r"(^|\.)\d+\.\w+\.")
"""Matches numbered parts of a network, such as ``layers.3.attention.wq.weight``."""

TALL_ROWS, TALL_RATIO = 16384, 48
"""Smallest number of rows, and of rows per column, of a table outside of numbered parts.

A vocabulary of 32128 at a width of 512 has 63 rows for each column. Projections of transformers
have 4 to 16; the few with more (64 in T5-11B and in DeepSeek's latent attention) are in numbered
layers. Embeddings of wide models have fewer, and need a name or a module.
"""


def without_wrappers(name: str) -> str:
    """``name`` without the parts that torch.compile, activation checkpointing and FSDP add.

    >>> without_wrappers("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def reason_not_multiplied(
    name: str, param: Tensor, options: Mapping[str, Any], kind: Kind | None = None
) -> str | None:
    """Reason why the fallback steps a matrix, in a few words; None if it is preconditioned.

    Args:
        name: Name of the parameter.
        param: The parameter; only its shape counts.
        options: Its parameter group.
        kind: Kind by its module, if a model is known.
    """
    wanted = options.get("precondition")
    if wanted:
        return None
    name = _PEFT.sub("", without_wrappers(name))
    found = {
        f"{kind} by its module": kind in ("embedding", "output head"),
        "embedding or table by its name": kind is None and _TABLES.search(name),
        "output head by its name": _HEADS.search(name) or _LAST_LAYERS.search(name),
        "router by its name": _ROUTERS.search(name),
        "table by its shape": _is_tall(name, param.shape[options.get("batch_dims", 0) :]),
        "in a group with precondition = False": wanted is not None,
    }
    return next((reason for reason, holds in found.items() if holds), None)


def _is_tall(name: str, shape: Sequence[int]) -> bool:
    if len(shape) != 2 or _REPEATED.search(name):
        return False
    return shape[0] >= max(TALL_ROWS, TALL_RATIO * shape[1])


def kinds_of(models: Iterable[nn.Module]) -> dict[Tensor, Kind]:
    """Embeddings, output heads and layers among the parameters of ``models``, by their modules.

    A weight that an embedding shares with another module is an embedding. An output head is a
    linear layer with the shape of an embedding outside of numbered parts of its model.
    """
    kinds: dict[Tensor, Kind] = {}
    linear: dict[Tensor, str] = {}
    for model in models:
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is None:
                continue
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                kinds[weight] = "embedding"
            elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                kinds.setdefault(weight, "layer")
                linear[weight] = f"{name}.weight"
    shapes = {param.shape for param, kind in kinds.items() if kind == "embedding"}
    for weight, name in linear.items():
        is_last = kinds[weight] == "layer" and not _REPEATED.search(name)
        if is_last and weight.shape in shapes:
            kinds[weight] = "output head"
    return kinds


def parts_of(model: Model | None) -> list[nn.Module]:
    """Parts of a model on this rank; empty without a model."""
    if model is None:
        return []
    return [model] if isinstance(model, nn.Module) else list(model)


def with_names(params: Iterable[Any] | nn.Module, models: Sequence[nn.Module]) -> list[Any]:
    """Parameters or groups as given to an optimizer, with the names of ``models`` added."""
    names = {param: name for model in models for name, param in model.named_parameters()}

    def named(some: Iterable[Any]) -> list[Any]:
        some = [some] if isinstance(some, Tensor) else list(some)
        if not all(isinstance(entry, Tensor) and entry in names for entry in some):
            return some
        return [(names[param], param) for param in some]

    given = list(params.named_parameters() if isinstance(params, nn.Module) else params)
    if given and isinstance(given[0], dict):
        return [{**group, "params": named(group["params"])} for group in given]
    return named(given)


def warn_without_names(groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn if parameters without names cannot be recognised; for constructors of base classes."""
    if any(
        "param_names" not in group and group["fallback"] and group["precondition"] is None
        for group in groups
    ):
        warnings.warn(
            "without names, embeddings and output heads cannot be recognised among other matrices "
            "and are preconditioned (except for very tall ones); pass model.named_parameters(), or "
            "model=model",
            stacklevel=4,  # the line of the user, who calls the constructor of a subclass
        )


VECTOR = "vector"
"""Reason for vectors and scalars, which is not worth a report."""


CANNOT_BE_TAPPED = "not in a layer that can be tapped"
"""Reason for matrices in methods with statistics of layers."""


def summary_of(
    method: str, fallback: str, params: Iterable[tuple[str, Tensor]], reasons: Mapping[Tensor, str]
) -> str:
    """One line: number of parameters that a method and its fallback step, and the reasons.

    Args:
        method: Name of the optimizer.
        fallback: Name of the method of the others.
        params: All parameters with their names.
        reasons: Reasons for those that the fallback steps.
    """
    sizes, left = [], defaultdict(list)
    for name, param in params:
        if param in reasons:
            left[reasons[param]].append(name)
        else:
            sizes.append(param.numel())
    count = len(sizes) + sum(map(len, left.values()))
    line = f"{method} steps {len(sizes)} of {count} parameters ({sum(sizes):,} numbers)"
    parts = [
        f"{reason}: {len(names) if reason == VECTOR else shortened(names)}"
        for reason, names in sorted(left.items())
    ]
    return f"{line}; {fallback} the others ({'; '.join(parts)})" if parts else line


def shortened(names: Sequence[str], most: int = 3) -> str:
    """The first ``most`` names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
