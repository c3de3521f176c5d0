"""State of a run by name, in global coordinates.

    model.layers.0.attention.wq.weight            weights and buffers
    optim.layers.0.attention.wq.weight.left.256   state of every optimizer, by parameter
    rng.torch                                     one row per rank
    train_state, lr_scheduler, dataloader         plain values, in the manifest

Tensors are live and loaded in place: no dtype changes, and a missing tensor cannot go unnoticed.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from checkpoint.manifest import MODEL_PREFIX, OPTIMIZER_PREFIX

MODEL, OPTIMIZER, PROGRESS, DATA = "model", "optimizer", "train_state", "dataloader"
PREFIXES = {MODEL: MODEL_PREFIX, OPTIMIZER: OPTIMIZER_PREFIX}
"""Components that consist of tensors, by the prefix of their keys."""

Geometry = dict[str, dict[str, Any]]


class RunState:
    """The components of a run as named tensors and plain values.

    Args:
        model_parts: The model's parts on this rank.
        optimizers: ``state_dict()`` returns live tensors by ``<parameter>.<name>``; ``geometry()``
            describes the layout of each parameter's state.
        values: Components with plain JSON state, the same on all ranks.
    """

    def __init__(
        self,
        model_parts: Iterable[nn.Module],
        optimizers: Any,  # noqa: ANN401 (torchtitan's containers are untyped)
        values: Mapping[str, Stateful],
    ) -> None:
        self._model_parts = list(model_parts)
        self._optimizers = optimizers
        self._values = dict(values)

    @property
    def components(self) -> tuple[str, ...]:
        """All names that can be left out when loading."""
        return (MODEL, OPTIMIZER, *self._values)

    def tensors(self, components: Iterable[str]) -> dict[str, Tensor]:
        """Live tensors of some components by key."""
        wanted = set(components)
        found: dict[str, Tensor] = {}
        if MODEL in wanted:
            found |= {PREFIXES[MODEL] + key: value for key, value in self.model().items()}
        if OPTIMIZER in wanted:
            state = self._optimizers.state_dict()
            found |= {PREFIXES[OPTIMIZER] + key: value for key, value in state.items()}
        return found

    def model(self) -> dict[str, Tensor]:
        """Live weights and buffers by the model's own names."""
        parts: Iterable[dict[str, Any]] = map(get_model_state_dict, self._model_parts)
        return {key: value for part in parts for key, value in part.items()}

    def take_model(self, loaded: dict[str, Tensor]) -> None:
        """Pass loaded weights to modules, as some of them have hooks for that."""
        weights: dict[str, Any] = dict(loaded)
        for part in self._model_parts:
            set_model_state_dict(part, weights, options=StateDictOptions(strict=False))

    def values(self) -> dict[str, Any]:
        """Plain state of the other components."""
        return {name: component.state_dict() for name, component in self._values.items()}

    def take_values(self, values: Mapping[str, Any]) -> None:
        """Load the plain state of some components."""
        for name, value in values.items():
            self._values[name].load_state_dict(value)

    @property
    def num_samples(self) -> int | None:
        """Number of training samples; None if the loader does not know it."""
        return getattr(self._values[DATA], "num_samples", None)

    def mesh(self) -> dict[str, int]:
        """Names and extents of the mesh axes over which weights are sharded or replicated."""
        meshes = (t.device_mesh for t in self.model().values() if isinstance(t, DTensor))
        mesh = max(meshes, key=lambda mesh: mesh.ndim, default=None)
        if mesh is None:
            return {}
        return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))

    def options_of(self, name: str) -> Mapping[str, Any]:
        """The parameter group of a parameter."""
        groups = (g for optimizer in self._optimizers.optimizers for g in optimizer.param_groups)
        found: Mapping[str, Any] = next(group for group in groups if name in group["param_names"])
        return found

    def geometry(self) -> Geometry:
        """Method, shape and block grid of the parameters on this rank."""
        found: Geometry = self._optimizers.geometry()
        return found


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors with floating ones in ``dtype``."""
    return {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in tensors.items()
    }
