"""Second-order optimizers for torch, on plain, DDP, FSDP2, HSDP and tensor-parallel parameters.

The public names are imported on first use, so that a configuration can be checked by
``titan_shampoo.config`` before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_shampoo.layer_optimizers import FOOF, KFAC, Eva, EvaF, EvaS
    from titan_shampoo.optimizers import SOAP, KLShampoo, Shampoo

__all__ = ["FOOF", "KFAC", "SOAP", "Eva", "EvaF", "EvaS", "KLShampoo", "Shampoo"]

_LAYER_METHODS = ("FOOF", "KFAC", "Eva", "EvaF", "EvaS")


def __getattr__(name: str) -> object:
    """The public class ``name`` of ``optimizers`` or ``layer_optimizers``."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "layer_optimizers" if name in _LAYER_METHODS else "optimizers"
    return getattr(import_module(f"titan_shampoo.{module}"), name)


def __dir__() -> list[str]:
    """The public names, for completion in a shell."""
    return __all__
