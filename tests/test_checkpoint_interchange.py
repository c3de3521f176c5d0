"""Weights go to other programs and come back; what others have written runs no code here."""

import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from checkpoint import hugging_face
from checkpoint.errors import CheckpointError
from checkpoint.hugging_face import export_weights, load_hugging_face
from checkpoint.interchange import convert, export
from checkpoint.native import NativeReader, alone, read_native, tensors_of, write_native
from checkpoint.reader import model_weights
from checkpoint.verify import verify
from parallel import transformer
from tests.support.checkpoint_runs import SHAPES, content, run_in
from tests.support.ranks import run_on_ranks
from titan_shampoo import titan
from titan_shampoo.titan import weights_adapter
from titan_shampoo.titan.recipes import TRANSFORMERS

RECIPE = titan.transformer(transformer.parallelize, transformer.pipeline)


def llama():
    torch.manual_seed(3)
    model = RECIPE.model_cls(TRANSFORMERS["byte_debug"])
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


ADAPTER = weights_adapter("llama3", "byte_debug")


@pytest.mark.parametrize("shard_bytes", [10**9, 10**6])
def test_weights_of_a_llama_come_back_from_hugging_faces_names(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(hugging_face, "MAX_SHARD_BYTES", shard_bytes)
    weights = llama()
    export_weights(weights.items(), tmp_path / "hf", ADAPTER)
    files = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert (files == ["model.safetensors"]) == (shard_bytes == 10**9)
    convert(tmp_path / "hf", tmp_path / "back", flavor="byte_debug")
    back = dict(model_weights(tmp_path / "back", verify(tmp_path / "back")))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_exported_weights_have_hugging_faces_names_and_rotary_order(tmp_path):
    weights = llama()
    export_weights(weights.items(), tmp_path / "hf", ADAPTER, torch.bfloat16)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(found["lm_head.weight"], weights["output.weight"].bfloat16())
    # Rotary pairs lie side by side here and half a head apart over there.
    heads, dim = TRANSFORMERS["byte_debug"].n_heads, TRANSFORMERS["byte_debug"].dim
    ours = weights["layers.0.attention.wq.weight"].view(heads, dim // heads // 2, 2, dim)
    theirs = found["model.layers.0.self_attn.q_proj.weight"].view(heads, 2, dim // heads // 2, dim)
    assert torch.equal(theirs, ours.transpose(1, 2).bfloat16())


def test_an_export_overwrites_nothing_and_leaves_nothing_half_done(tmp_path):
    weights = llama()
    (tmp_path / "hf").mkdir()
    with pytest.raises(CheckpointError, match="exists; name another folder"):
        export_weights(weights.items(), tmp_path / "hf", ADAPTER)

    def failing():
        yield next(iter(weights.items()))
        raise CheckpointError("the checkpoint cannot be read")

    with pytest.raises(CheckpointError, match="cannot be read"):
        export_weights(failing(), tmp_path / "other", ADAPTER)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)


def load_small(folder):
    torch.manual_seed(dist.get_rank())
    model = Small()
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    weights = dict(model.state_dict())
    group = dist.group.WORLD
    assert group is not None
    try:
        load_hugging_face(folder, weights, None, group)
    except CheckpointError as error:
        return str(error)
    if dist.get_world_size() == 1:
        return weights
    return {name: value.full_tensor() for name, value in weights.items()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_weights_of_other_programs_load_on_any_number_of_ranks(tmp_path, world):
    stored = Small().state_dict()
    save_file(dict(stored), tmp_path / "model.safetensors")
    for found in run_on_ranks(world, load_small, tmp_path):
        assert all(torch.equal(found[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stored: stored.pop("last.bias"), ["last.bias: not in the files"]),
        (lambda stored: stored.update({"last.bias": torch.ones(4)}), ["last.bias: [4]", "[3]"]),
        (lambda stored: stored.clear(), ["has no .safetensors files"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_on_every_rank(tmp_path, change, words):
    stored = dict(Small().state_dict())
    change(stored)
    if stored:
        save_file(stored, tmp_path / "model.safetensors")
    first, second = run_on_ranks(2, load_small, tmp_path)
    assert first == second
    assert all(word in first for word in [*words, str(tmp_path)])


# ---- torch's own format


def save_run(folder):
    with run_in(folder, "fsdp2") as run:
        run.manager.load()
        run.train(2)


def test_a_checkpoint_goes_to_torchs_format_and_back(tmp_path):
    run_on_ranks(2, save_run, tmp_path)
    place = tmp_path / "checkpoint" / "step-2"
    export(place, verify(place), tmp_path / "dcp", to="dcp", dtype=None, progress=lambda _: None)
    native = read_native(tmp_path / "dcp")
    for key, value in content(place).items():
        assert torch.equal(native[key.removeprefix("model.")], value)
    convert(tmp_path / "dcp", tmp_path / "back", flavor=None)
    weights = dict(model_weights(place, verify(place)))
    back = dict(model_weights(tmp_path / "back", verify(tmp_path / "back")))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def native_of_two_ranks(folder):
    """As torchtitan saves: bare names of weights, and other things beside them."""
    with run_in(folder / "run", "fsdp2") as run:
        state = {**run.manager._state.model(), "train_state": {"step": 3}, "lr": 0.1}
        dcp.save(state, checkpoint_id=folder / "native")
        weights: dict[str, Any] = dict(run.manager._state.model())
        return {name: value.full_tensor() for name, value in weights.items()}


def load_initial(folder, path, layout):
    with run_in(folder, layout, initial_load_path=str(path)) as run:
        for param in run.model.parameters():
            param.data.zero_()
        loaded = run.manager.load()
        run.save_to(folder / f"from-{layout}" / "step-0")
        return loaded


@pytest.mark.parametrize("layout", ["single", "fsdp3"])
def test_a_run_begins_from_weights_in_torchs_own_format(tmp_path, layout):
    weights, _ = run_on_ranks(2, native_of_two_ranks, tmp_path)
    world = 1 if layout == "single" else 3
    path = tmp_path / "native"
    assert all(run_on_ranks(world, load_initial, tmp_path, path, layout))
    found = content(tmp_path / f"from-{layout}" / "step-0")
    assert all(torch.equal(found[f"model.{name}"], weights[name]) for name in weights)


def refused_initial(folder, path, shapes):
    with run_in(folder, "pp2", shapes=shapes, initial_load_path=str(path)) as run:
        before = run.local_bytes()
        try:
            run.manager.load()
        except CheckpointError as error:
            return str(error), before == run.local_bytes()
    return "loaded", False


def test_weights_in_torchs_format_that_do_not_fit_one_stage_are_refused_on_all(tmp_path):
    run_on_ranks(2, native_of_two_ranks, tmp_path)
    shapes = {**SHAPES, "wo.weight": (5, 8)}
    first, second = run_on_ranks(2, refused_initial, tmp_path, tmp_path / "native", shapes)
    assert first == second
    assert "wo.weight: [5, 7] torch.float32 in the checkpoint, [5, 8]" in first[0]
    assert first[1]


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def _bombs(marker: Path):
    touch = f"touch {marker}"
    return {
        "os.system": Bomb(os.system, touch),
        "subprocess": Bomb(subprocess.call, touch, 0, None, None, None, None, None, True, True),
        "eval": Bomb(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Bomb(exec, f"open({str(marker)!r}, 'w')"),
        "getattr": Bomb(getattr, "", "upper"),
        "open": Bomb(open, str(marker), "w"),
        "pathlib method": Bomb(Path.touch, marker),
        "torch.load": Bomb(torch.load, str(marker)),
        "import": Bomb(__import__, "antigravity"),
    }


BOMBS = tuple(_bombs(Path()))


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("inside", [False, True])
def test_hostile_metadata_run_no_code(tmp_path, name, inside):
    marker = tmp_path / "exploded"
    bomb = _bombs(marker)[name]
    (tmp_path / "native").mkdir()
    found = Metadata({}, planner_data=bomb) if inside else bomb
    (tmp_path / "native" / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match=r"\.metadata: not read: .* it may hold code"):
        read_native(tmp_path / "native")
    assert not marker.exists()


def test_hostile_items_are_not_opened(tmp_path):
    """An item that is no tensor is a pickle of its own."""
    marker = tmp_path / "exploded"
    bombs = _bombs(marker)
    state = {"x": torch.ones(3), "train_state": bombs["os.system"], "y": bombs["eval"]}
    with alone():
        dcp.save(state, checkpoint_id=tmp_path / "native", no_dist=True)
    marker.unlink(missing_ok=True)
    assert read_native(tmp_path / "native")["x"].tolist() == [1, 1, 1]
    assert not marker.exists()


def test_a_hostile_tensor_is_not_unpickled(tmp_path):
    marker = tmp_path / "exploded"
    write_native(tmp_path / "native", {"x": torch.ones(3)})
    reader = NativeReader(tmp_path / "native")
    assert list(tensors_of(reader)) == ["x"]
    (file,) = (tmp_path / "native").glob("*.distcp")
    content = pickle.dumps(_bombs(marker)["os.system"])
    file.write_bytes(content + bytes(max(0, file.stat().st_size - len(content))))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_native(tmp_path / "native")
    assert not marker.exists()


def test_files_outside_of_the_folder_are_not_read(tmp_path):
    write_native(tmp_path / "native", {"x": torch.ones(3)})
    metadata = NativeReader(tmp_path / "native").read_metadata()
    (entry,) = metadata.storage_data.values()
    shutil.copy(tmp_path / "native" / entry.relative_path, tmp_path / "outside")
    entry.relative_path = "../outside"
    (tmp_path / "native" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        read_native(tmp_path / "native")
