"""The recipes: for each, a table of the parts that torchtitan's trainer needs.

The functions that shard a model are arguments (``parallel/``). Flavours without a vocabulary
("byte_...") read text as bytes; all others need the tokenizer of their vocabulary.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, llama3_args
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.llama4 import Transformer as MixtureTransformer
from torchtitan.protocols.train_spec import ParallelizeFunction, PipeliningFunction, TrainSpec

from titan_shampoo.config.errors import ConfigError
from titan_shampoo.data import printable
from titan_shampoo.data.loader import PositionedLoader
from titan_shampoo.data.streams import StreamedWindows, StreamLoader, TextStream
from titan_shampoo.data.text import TextDataset
from titan_shampoo.data.tokenizer import ByteTokenizer, Tokenizer
from titan_shampoo.models.resnet import ResNet, ResNetArgs
from titan_shampoo.titan.experts import (
    MIXTURES,
    build_balanced_optimizers,
    install_cpu_experts,
)
from titan_shampoo.titan.images import (
    ImageModelArgs,
    build_class_loss,
    image_loader,
    image_validator,
)
from titan_shampoo.titan.learning_rates import build_learning_rates
from titan_shampoo.titan.loaders import evaluation_loader, training_loader
from titan_shampoo.titan.metrics import Progress
from titan_shampoo.titan.optimizers import build_optimizers
from titan_shampoo.titan.tokenizer import DocumentTokenizer
from titan_shampoo.titan.validation import Validator

_logger = logging.getLogger(__name__)

TRANSFORMERS: Mapping[str, TransformerModelArgs] = {
    # 0.87 M parameters.
    "byte_debug": TransformerModelArgs(
        dim=128, n_layers=4, n_heads=4, vocab_size=256, multiple_of=32
    ),
    "27M": TransformerModelArgs(dim=512, n_layers=6, n_heads=8, vocab_size=8192),
    "160M": TransformerModelArgs(dim=768, n_layers=12, n_heads=12, vocab_size=32000),
    # Llama 3.2 1B without tied embeddings.
    "1B": TransformerModelArgs(
        dim=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim_multiplier=1.5,
        multiple_of=256,
        rope_theta=500000,
    ),
    **llama3_args,
}


def text_recipe(
    model_cls: Callable[[Any], nn.Module],
    flavors: Mapping[str, Any],
    parallelize: ParallelizeFunction,
    pipeline: PipeliningFunction | None = None,
) -> TrainSpec:
    """Return the recipe of a model that predicts the next token of a text.

    Args:
        model_cls: Makes the model of one of ``flavors``: ``(batch, length)`` tokens to
            ``(batch, length, vocab_size)`` logits; has ``init_weights``.
        flavors: Model arguments by ``model.flavor``; each has a ``vocab_size``, and torchtitan's
            ``update_from_config`` and ``get_nparams_and_flops``.
        parallelize: Shards a model, or a part of a pipeline.
        pipeline: Cuts a model into the parts of a pipeline; None if it cannot be cut.
    """
    return TrainSpec(
        model_cls=model_cls,
        model_args=copy.deepcopy(flavors),  # torchtitan writes the sequence length into it
        parallelize_fn=parallelize,
        pipelining_fn=pipeline,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_learning_rates,
        build_dataloader_fn=_text_loader,
        build_tokenizer_fn=partial(build_tokenizer, flavors=flavors),
        build_loss_fn=build_cross_entropy_loss,
        build_validator_fn=_text_validator,
        build_metrics_processor_fn=partial(_progress, unit="tokens"),
    )


def transformer(parallelize: ParallelizeFunction, pipeline: PipeliningFunction | None) -> TrainSpec:
    """Return the recipe of a Llama-style transformer on text.

    Args:
        parallelize: Shards a model, or a part of a pipeline.
        pipeline: Cuts a model into the parts of a pipeline; None if it cannot be cut.
    """
    recipe = text_recipe(Transformer, TRANSFORMERS, parallelize, pipeline)
    return replace(recipe, state_dict_adapter=Llama3StateDictAdapter)


def mixture(parallelize: ParallelizeFunction) -> TrainSpec:
    """Return the recipe of a Llama-style mixture of experts on text.

    Args:
        parallelize: Shards a model.
    """
    install_cpu_experts()
    recipe = text_recipe(MixtureTransformer, MIXTURES, parallelize)
    return replace(recipe, build_optimizers_fn=build_balanced_optimizers)


RESNETS: Mapping[str, ImageModelArgs] = {
    f"resnet{depth}{suffix}": ImageModelArgs(ResNetArgs(depth=depth, small_stem=small_stem))
    for depth in (18, 34, 50, 101)
    for suffix, small_stem in (("", False), ("_small", True))
} | {"resnet20_small": ImageModelArgs(ResNetArgs(depth=20, small_stem=True))}


def resnet(parallelize: ParallelizeFunction) -> TrainSpec:
    """Return the recipe of a residual network on images; ``_small`` flavours are for 32x32.

    Args:
        parallelize: Shards a model.
    """
    return TrainSpec(
        model_cls=_build_resnet,
        model_args=copy.deepcopy(RESNETS),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_learning_rates,
        build_dataloader_fn=image_loader,
        build_tokenizer_fn=None,
        build_loss_fn=build_class_loss,
        build_validator_fn=image_validator,
        build_metrics_processor_fn=partial(_progress, unit="images"),
    )


def build_tokenizer(job_config: JobConfig, flavors: Mapping[str, Any] = TRANSFORMERS) -> Tokenizer:
    """Return the tokenizer in ``model.hf_assets_path``, or the byte-level one if that is empty.

    Args:
        job_config: Configuration with folder, flavour and ``document_separators``.
        flavors: Flavours of the model, each with its ``vocab_size``.

    Raises:
        ConfigError: If the folder has no tokenizer, or one that does not fit the model.
    """
    folder, flavor = job_config.model.hf_assets_path, job_config.model.flavor
    separators = job_config.training.document_separators
    vocab_size = flavors[flavor].vocab_size
    model = f'model.flavor = "{flavor}" has a vocabulary of {vocab_size}'
    if not folder:
        tokenizer = ByteTokenizer(separators)
        if tokenizer.get_vocab_size() != vocab_size:
            raise ConfigError(
                f"{model}, bytes one of {tokenizer.get_vocab_size()}; set model.hf_assets_path to "
                f'the folder of its tokenizer, or model.flavor = "{next(iter(flavors))}"'
            )
        return tokenizer
    tokenizer = _read_tokenizer(folder, separators)
    if tokenizer.get_vocab_size() > vocab_size:
        raise ConfigError(
            f"{model}, the tokenizer in model.hf_assets_path = {folder} one of "
            f"{tokenizer.get_vocab_size()}; set another model.flavor or another tokenizer"
        )
    keeps_apart = getattr(flavors[flavor], "attn_mask_type", None) == "block_causal"
    if keeps_apart and tokenizer.eos_id is None:
        raise ConfigError(
            f'model.flavor = "{flavor}" attends within documents, and the tokenizer in '
            f"model.hf_assets_path = {folder} names no eos_token that ends them; {_MARKS_REMEDY}"
        )
    if separators and not tokenizer.encode("") and _is_first_rank():
        _logger.warning(
            "the tokenizer in model.hf_assets_path = %s names neither bos_token nor eos_token, so "
            "documents run into each other; %s, or set training.document_separators = false",
            printable(folder), _MARKS_REMEDY,
        )  # fmt: skip
    return tokenizer


_MARKS_REMEDY = "put its tokenizer_config.json there, too"


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _read_tokenizer(folder: str, separators: bool = True) -> DocumentTokenizer:
    if not Path(folder).is_dir():
        raise ConfigError(f"model.hf_assets_path = {folder}: there is no such folder")
    try:
        return DocumentTokenizer(folder, separators=separators)
    except Exception as error:  # the tokenizers library raises bare Exception for broken files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model.hf_assets_path = {folder}: no tokenizer can be read from it "
            f"({reason}); it should hold tokenizer.json"
        ) from error


def _text_loader(
    *, dp_world_size: int, dp_rank: int, tokenizer: Tokenizer, job_config: JobConfig
) -> PositionedLoader | StreamLoader:
    training = job_config.training
    if training.streaming:
        return StreamLoader(
            _stream(training.dataset, job_config, tokenizer, training.seq_len),
            local_batch_size=training.local_batch_size,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
        )
    data = TextDataset(
        training.dataset,
        tokenizer=tokenizer,
        seq_len=training.seq_len,
        part="all" if job_config.validation.dataset else "train",
        max_bad_fraction=training.max_bad_fraction,
    )
    return training_loader(data, job_config, dp_world_size, dp_rank)


def _stream(source: str, job_config: JobConfig, tokenizer: Tokenizer, seq_len: int) -> TextStream:
    training = job_config.training
    return TextStream(
        source,
        tokenizer=tokenizer,
        seq_len=seq_len,
        num_shards=training.stream_lanes,
        hold_out=not job_config.validation.dataset,
        max_bad_fraction=training.max_bad_fraction,
    )


def _held_out_text(
    job_config: JobConfig, tokenizer: Tokenizer, dp_world_size: int
) -> TextDataset | StreamedWindows:
    training, validation = job_config.training, job_config.validation
    seq_len = validation.seq_len or training.seq_len
    if training.streaming and not validation.dataset:
        stream = _stream(training.dataset, job_config, tokenizer, seq_len)
        num_windows = validation.steps * validation.local_batch_size * dp_world_size
        where = f'training.dataset = "{training.dataset}"'
        return StreamedWindows(stream.held_out(num_windows), where=where)
    own = validation.dataset
    return TextDataset(
        own or training.dataset,
        tokenizer=tokenizer,
        seq_len=seq_len,
        part="all" if own else "validation",
        key="validation.dataset" if own else "training.dataset",
        max_bad_fraction=training.max_bad_fraction,
    )


def _text_validator(
    *,
    job_config: JobConfig,
    tokenizer: Tokenizer,
    dp_world_size: int,
    dp_rank: int,
    **trainer: Any,  # noqa: ANN401 (what torchtitan's trainer hands to a validator)
) -> Validator:
    data = _held_out_text(job_config, tokenizer, dp_world_size)
    loader = evaluation_loader(data, job_config, dp_world_size, dp_rank)
    return Validator(loader, job_config=job_config, reports="perplexity", **trainer)


def _build_resnet(model_args: ImageModelArgs) -> ResNet:
    return ResNet(model_args.network)


def _progress(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args: object, *, unit: str
) -> Progress:
    return Progress(job_config, parallel_dims, unit=unit)
