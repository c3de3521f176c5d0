"""Load of a checkpoint into a run: all of it is checked before anything changes.

The files were verified before (``checkpoint.finding``). Names, shapes, methods and grids are
compared here, on all ranks, and then tensors are loaded in place.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from checkpoint import rng
from checkpoint.compare import (
    geometry_problems,
    option_of,
    tensor_problems,
    unwanted,
)
from checkpoint.data_order import order_differences
from checkpoint.errors import CheckpointError, in_one_line
from checkpoint.finding import Found, verify_together
from checkpoint.hugging_face import load_hugging_face
from checkpoint.manifest import OPTIMIZER_PREFIX
from checkpoint.native import load_native
from checkpoint.ranks import from_rank_0, gathered, say
from checkpoint.reader import Reader, whole_tensors
from checkpoint.reblock import can_reblock, fill, grid_of, is_factor, is_per_block
from checkpoint.settings import settings_differences
from checkpoint.state import DATA, MODEL, OPTIMIZER, PREFIXES, PROGRESS, RunState

_logger = logging.getLogger(__name__)


class Loading:
    """Loads checkpoints into a run.

    Args:
        state: State of the run, changed in place.
        settings: Settings of this run, by dotted name.
        group: All ranks.
        reblocks: True if Shampoo's factors may be approximated for another block size.
        data_position: Treatment of the saved position if the data have another order.
    """

    def __init__(
        self,
        state: RunState,
        settings: Mapping[str, Any],
        group: dist.ProcessGroup,
        *,
        reblocks: bool,
        data_position: str,
    ) -> None:
        self._state, self._settings, self._group = state, settings, group
        self._reblocks, self._data_position = reblocks, data_position

    def load(self, found: Found, components: set[str]) -> None:
        """Load some components of a verified checkpoint, if they fit this run.

        Raises:
            CheckpointError: On every rank and before anything changes, if they do not.
        """
        manifest, record = found.manifest, found.manifest.record
        tensors = self._state.tensors(components)
        recut = self._to_recut(record) if OPTIMIZER in components else []
        exact = {key: t for key, t in tensors.items() if not _is_recut(key, recut)}
        self._check(found, components, exact, recut)
        # A run that begins at step 1 keeps its initial generators.
        goes_on = PROGRESS in components
        rows = self._generators(found) if goes_on else {}
        self._read(found, exact)
        self._recut(found, recut, tensors)
        if MODEL in components:
            self._state.take_model(_without_prefix(tensors))
        self._state.take_values(self._values(record, components))
        if rows:
            rng.restore(rows)
        elif goes_on:
            self._reseed(manifest.step, record)
        if DATA in components:
            self._say_where_data_begin(record)
        if self._settings and record.get("settings"):
            for line in settings_differences(record["settings"], self._settings):
                say(_logger, logging.INFO, "%s", line)

    def load_initial(self, config: Any, adapter: Any) -> bool:  # noqa: ANN401 (torchtitan's)
        """Begin from another run's checkpoint if the settings name one; return True then.

        Args:
            config: The ``[checkpoint]`` table.
            adapter: torchtitan's state-dict adapter; None if the model has none.

        Raises:
            CheckpointError: On every rank, if it is damaged or does not fit, or if the settings
                exclude all that would be loaded from it.
        """
        path = config.initial_load_path
        only_model = config.initial_load_model_only or config.initial_load_in_hf
        if (path or config.initial_load_in_hf) and only_model:
            self._check_not_left_out(config)
        if config.initial_load_in_hf:
            self._load_hugging_face(path, adapter)
            return True
        if not path:
            return False
        folder = Path(path)
        if from_rank_0((folder / ".metadata").is_file, self._group, folder):
            self._load_native(folder, only_model=only_model)
        else:
            found = verify_together(folder, self._group)
            wanted = {MODEL} if only_model else set(self._state.components)
            self.load(found, wanted - set(config.exclude_from_loading))
        return True

    @staticmethod
    def _check_not_left_out(config: Any) -> None:  # noqa: ANN401
        if MODEL in config.exclude_from_loading:
            raise CheckpointError(
                f"checkpoint.exclude_from_loading: {MODEL}, and the model is all that "
                "checkpoint.initial_load_path gives here; remove one of the two"
            )

    def _load_hugging_face(self, path: str | None, adapter: Any) -> None:  # noqa: ANN401
        path = path or getattr(adapter, "hf_assets_path", None)
        if not path:
            raise CheckpointError(
                "checkpoint.initial_load_in_hf needs checkpoint.initial_load_path, or "
                "model.hf_assets_path"
            )
        folder, model = Path(path), self._state.model()
        load_hugging_face(folder, model, adapter, self._group)
        self._state.take_model(model)

    def _load_native(self, folder: Path, *, only_model: bool) -> None:
        if not only_model:
            raise CheckpointError(
                f"{folder}: of torch's own format, of which only the model is read; set "
                "checkpoint.initial_load_model_only = true"
            )
        model = self._state.model()
        load_native(folder, model, self._group)
        self._state.take_model(model)

    def _to_recut(self, record: Mapping[str, Any]) -> list[str]:
        """Parameters of this rank with another block size, if they may be approximated."""
        saved, own = record.get("geometry", {}), self._state.geometry()
        return [
            name
            for name, one in own.items()
            if self._reblocks
            and name in saved
            and one.get("grid") != saved[name].get("grid")
            and can_reblock(one, saved[name])
        ]

    def _recut(self, found: Found, recut: list[str], tensors: Mapping[str, Tensor]) -> None:
        """Approximate the factors of blocks with another size."""
        saved, own = found.manifest.record.get("geometry", {}), self._state.geometry()
        for name in recut:
            prefix = f"{OPTIMIZER_PREFIX}{name}."
            keys = [k for k in found.manifest.tensors if k.startswith(prefix)]
            factors = {
                key.removeprefix(prefix): whole
                for key, whole in whole_tensors(
                    found.folder, found.manifest, [k for k in keys if is_factor(k, prefix)]
                )
            }
            state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            grids = grid_of(saved[name]), grid_of(own[name])
            fill(state, factors, *grids, int(state["step"]), self._state.options_of(name))
        if recut:
            say(
                _logger,
                logging.INFO,
                "%d parameters have blocks of another size: their factors are approximate",
                len(recut),
            )

    def _check(
        self,
        found: Found,
        components: set[str],
        tensors: Mapping[str, Tensor],
        recut: list[str],
    ) -> None:
        """Refuse, on all ranks, a checkpoint that does not fit this run."""
        problems = list(self._problems(found, components, tensors, recut))
        extra = {key for key in unwanted(tensors, found.manifest) if not _is_recut(key, recut)}
        found_by_rank = gathered((problems[:1], len(problems), extra), self._group)
        unused = sorted(set.intersection(*(extra for *_, extra in found_by_rank)))
        lines = [line for first, *_ in found_by_rank for line in first]
        lines += [
            f"{key}: in the checkpoint, not in this run{option_of(key)}" for key in unused[:1]
        ]
        if lines:
            count = max(number for _, number, _ in found_by_rank) + len(unused)
            more = f" (and {count - 1} more)" if count > 1 else ""
            raise CheckpointError(f"{found.folder}: {lines[0]}{more}")

    def _problems(
        self,
        found: Found,
        components: set[str],
        tensors: Mapping[str, Tensor],
        recut: list[str],
    ) -> Iterator[str]:
        record = found.manifest.record
        if OPTIMIZER in components:
            own = {k: one for k, one in self._state.geometry().items() if k not in recut}
            yield from geometry_problems(own, record.get("geometry", {}))
        yield from tensor_problems(tensors, found.manifest)
        if DATA in components and self._data_position == "refuse":
            yield from self._order_problems(record)
        values, own = self._values(record, components), self._state.values()
        for name in sorted(components - PREFIXES.keys()):
            for key in sorted(own[name].keys() - values.get(name, {}).keys()):
                yield f"{name}.{key}: not in the checkpoint"

    def _order_problems(self, record: Mapping[str, Any]) -> Iterator[str]:
        differing = self._order_differences(record)
        if differing:
            yield (
                f"{differing}: the data come in another order, in which the position of the "
                "checkpoint repeats some samples and misses others; set it back, or "
                'checkpoint.data_position = "restart" or "keep"'
            )

    def _order_differences(self, record: Mapping[str, Any]) -> str:
        return order_differences(record, self._settings, self._state.num_samples)

    def _values(self, record: Mapping[str, Any], components: set[str]) -> dict[str, Any]:
        """Plain state to load."""
        saved = record.get("values", {})
        values = {name: saved[name] for name in saved if name in components}
        if DATA in values and self._data_position != "refuse" and self._order_differences(record):
            position = (
                {} if self._data_position == "restart" else {"samples": saved[DATA]["samples"]}
            )
            values[DATA] = self._state.values()[DATA] | position
        return values

    def _say_where_data_begin(self, record: Mapping[str, Any]) -> None:
        differing = self._order_differences(record)
        if differing:
            restarts = self._data_position == "restart"
            say(
                _logger,
                logging.WARNING,
                "%s: the data come in another order, and are read from %s",
                differing,
                "their beginning"
                if restarts
                else "the position of the checkpoint: some samples may be repeated and some missed",
            )

    def _read(self, found: Found, tensors: dict[str, Tensor]) -> None:
        reader = Reader(found.folder, found.manifest)
        try:
            dcp.load(tensors, storage_reader=reader, process_group=self._group)
        except CheckpointException as error:  # a BaseException: it would pass most handlers
            raise in_one_line(found.folder, "cannot be loaded", error) from error

    def _generators(self, found: Found) -> dict[str, Tensor]:
        """States of this rank's random generators; empty if another number of ranks saved them.

        Raises:
            CheckpointError: On every rank, if a generator would reject its state.
        """
        rows = rng.rng_rows(dist.get_rank(), dist.get_world_size())
        if any(tensor_problems(rows, found.manifest)):
            return {}
        self._read(found, rows)
        for wrong in gathered(rng.problem(rows), self._group):
            if wrong is not None:
                raise CheckpointError(f"{found.folder}: {wrong}")
        return rows

    def _reseed(self, step: int, record: Mapping[str, Any]) -> None:
        rng.reseed(self._settings.get("debug.seed") or 0, step, dist.get_rank())
        saved = record.get("world", {})
        say(
            _logger,
            logging.INFO,
            "random generators are seeded again: saved on %s %s ranks, this run has %d",
            saved.get("ranks"),
            saved.get("device"),
            dist.get_world_size(),
        )


def _is_recut(key: str, recut: list[str]) -> bool:
    """True if a tensor belongs to blocks that are approximated."""
    name = key.removeprefix(OPTIMIZER_PREFIX)
    return any(
        name.startswith(f"{one}.") and is_per_block(name.removeprefix(f"{one}.")) for one in recut
    )


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = PREFIXES[MODEL]
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
