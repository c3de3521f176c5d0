"""Packages of the extra ``train``, and the one line that says how to install them.

The optimizers need torch and numpy alone. Settings, data, plots and the training stack need more.
"""

import sys
from importlib.util import find_spec

__all__ = ["TRAIN", "MissingExtraError", "end_without", "require"]

TRAIN = {
    "torchtitan": "torchtitan",
    "safetensors": "safetensors",
    "datasets": "datasets",
    "huggingface_hub": "huggingface-hub",
    "tomli": "tomli",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "tqdm": "tqdm",
    "xxhash": "xxhash",
}
"""Names of modules to names of packages."""


class MissingExtraError(ModuleNotFoundError):
    """A module of the extra ``train`` that is not installed: one line, with the remedy."""


def require(needer: str, *modules: str) -> None:
    """Refuse to go on without ``modules``.

    Args:
        needer: What needs them, as a person calls it.
        modules: Keys of ``TRAIN``; all of them if none is given.

    Raises:
        MissingExtraError: If any is not installed, naming all that are not.
    """
    missing = [name for name in modules or TRAIN if find_spec(name) is None]
    if missing:
        packages = ", ".join(TRAIN[name] for name in missing)
        line = f"{needer} needs {packages}: pip install 'titan-shampoo[train]'"
        raise MissingExtraError(line, name=missing[0])


def end_without(needer: str, *modules: str) -> None:
    """``require`` for programs: one line on stderr and exit code 2."""
    try:
        require(needer, *modules)
    except MissingExtraError as missing:
        sys.stderr.write(f"{missing}\n")
        sys.exit(2)
