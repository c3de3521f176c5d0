"""The recipes by ``model.name``, each with its sharding."""

from parallel import mixture, resnet, transformer
from titan_shampoo import titan
from titan_shampoo.titan import TrainSpec


def recipe_of(model_name: str) -> TrainSpec:
    """The recipe for ``model.name``, one of those that the settings allow."""
    recipes = {
        "llama3": titan.transformer(transformer.parallelize, transformer.pipeline),
        "llama4": titan.mixture(mixture.parallelize),
        "resnet": titan.resnet(resnet.parallelize),
    }
    return recipes[model_name]
