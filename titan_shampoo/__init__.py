"""Second-order optimizers for torch, on plain, DDP, FSDP2, HSDP and tensor-parallel parameters.

The public names are imported on first use, so that a configuration can be checked by
``titan_shampoo.config`` before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_shampoo.blocks.methods import SOAP, KLShampoo, Shampoo
    from titan_shampoo.layers.methods import FOOF, KFAC, Eva, EvaF, EvaS

__version__ = "0.1.0"

__all__ = ["FOOF", "KFAC", "SOAP", "Eva", "EvaF", "EvaS", "KLShampoo", "Shampoo"]

_LAYER_METHODS = ("FOOF", "KFAC", "Eva", "EvaF", "EvaS")


def __getattr__(name: str) -> object:
    """The public class ``name`` of ``blocks`` or ``layers``."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = "layers" if name in _LAYER_METHODS else "blocks"
    return getattr(import_module(f"titan_shampoo.{package}.methods"), name)


def __dir__() -> list[str]:
    """The public names, for completion in a shell."""
    return __all__
