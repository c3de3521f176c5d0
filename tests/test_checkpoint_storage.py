"""What is written is read back, nothing else is believed, and dying at any moment loses nothing."""

import json
import math
import os
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors import safe_open

from checkpoint.errors import CheckpointError
from checkpoint.manifest import ITEM_BYTES
from checkpoint.native import alone
from checkpoint.reader import Reader, whole_tensors
from checkpoint.record import describe_run
from checkpoint.verify import read_manifest, verify
from checkpoint.writer import TORCH_DTYPES, Writer
from tests.soak.corruptions import DAMAGES, count_undetected
from tests.soak.crashes import crash_points
from tests.support.checkpoint_runs import run_in
from tests.support.ranks import run_on_ranks
from titan_shampoo.distributed.state import BlockTensor


def write(place, tensors, **record):
    writer = Writer(place, describe_run(5, "test", "model") | record)
    with alone():
        dcp.save(tensors, storage_writer=writer, no_dist=True)
    return place


def read(place, tensors):
    with alone():
        dcp.load(tensors, storage_reader=Reader(place, verify(place)), no_dist=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run of two FSDP2 ranks that saved steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(2, two_steps, folder)
    return folder / "checkpoint"


def two_steps(folder):
    with run_in(folder, "fsdp2") as run:
        run.manager.load()
        run.train(2)


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_every_dtype_comes_back_bit_for_bit(tmp_path, name):
    dtype = TORCH_DTYPES[name]
    bits = torch.randint(0, 256, (3, 5, dtype.itemsize), dtype=torch.uint8)
    original = (bits % 2).bool()[..., 0] if name == "BOOL" else bits.view(dtype)[..., 0]
    write(tmp_path / "step-5", {"model.x": original})
    loaded = torch.zeros_like(original)
    read(tmp_path / "step-5", {"model.x": loaded})
    assert torch.equal(loaded.view(torch.uint8), original.contiguous().view(torch.uint8))
    assert ITEM_BYTES[name] == dtype.itemsize


def test_scalars_and_empty_and_strided_tensors_come_back(tmp_path):
    tensors = {
        "model.number": torch.tensor(7),
        "model.empty": torch.empty(0, 4),
        "model.turned": torch.arange(12.0).view(3, 4).t(),
    }
    write(tmp_path / "step-5", tensors)
    loaded = {key: torch.zeros_like(value) for key, value in tensors.items()}
    read(tmp_path / "step-5", loaded)
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())


def test_adjacent_blocks_lie_in_the_file_as_one(tmp_path):
    stack = torch.arange(5 * 4.0).view(5, 2, 2)
    chunks: dict[tuple[int, ...], torch.Tensor]
    chunks = {(n, 0, 0): stack[n : n + 1] for n in (0, 1, 2, 4)}
    chunks[3, 0, 0] = stack[3:4].clone()
    write(tmp_path / "step-5", {"model.left.2": BlockTensor((5, 2, 2), chunks, torch.float32)})
    manifest = verify(tmp_path / "step-5")
    assert [box.extent for box in manifest.tensors["model.left.2"].boxes] == [(5, 2, 2)]
    assert torch.equal(
        next(whole_tensors(tmp_path / "step-5", manifest, ["model.left.2"]))[1], stack
    )


def test_any_safetensors_reader_reads_the_files(saved):
    manifest = read_manifest(saved / "step-2")
    for name in manifest.files:
        with safe_open(saved / "step-2" / name, framework="numpy") as file:
            expected = {b.entry(k, e.shape) for k, e, b in manifest.entries() if b.file == name}
            assert set(file.keys()) == expected
            assert all(file.get_tensor(key).size for key in expected)


def test_sums_are_lines_of_hash_and_name_as_xxhsum_reads_them(saved):
    lines = (saved / "step-2" / "XXH128SUMS").read_text().splitlines()
    found = {path.name for path in (saved / "step-2").iterdir()} - {"XXH128SUMS"}
    assert {name for _, name in (line.split("  ") for line in lines)} == found
    for line in lines:
        digest, name = line.split("  ")
        assert digest == xxhash.xxh128((saved / "step-2" / name).read_bytes()).hexdigest()


def test_files_are_as_small_as_their_tensors(saved):
    manifest = read_manifest(saved / "step-2")
    ideal = sum(entry.bytes for entry in manifest.tensors.values())
    found = sum(path.stat().st_size for path in (saved / "step-2").iterdir())
    assert found <= 1.01 * ideal + 2048 * len(manifest.tensors)


def test_a_manifest_says_what_the_state_means(saved):
    record = read_manifest(saved / "step-2").record
    assert record["step"] == 2
    assert record["world"]["ranks"] == 2
    assert record["geometry"]["wq.weight"]["grid"]["edges"][0][:2] == [0, 4]
    assert record["values"]["dataloader"] == {"samples": 16}
    assert record["software"]["torch"] == torch.__version__


def test_what_is_no_tensor_is_refused_by_name(tmp_path):
    with pytest.raises(dcp.api.CheckpointException, match=r"optim\.lr: not a tensor"):
        write(tmp_path / "step-5", {"optim.lr": 0.1})
    with pytest.raises(
        dcp.api.CheckpointException, match=r"note\.loss: got NaN, wanted a finite number"
    ):
        write(tmp_path / "step-5", {"model.x": torch.ones(2)}, note={"loss": math.nan})
    assert not (tmp_path / "step-5").exists()


def test_a_checkpoint_is_never_overwritten(tmp_path):
    write(tmp_path / "step-5", {"model.x": torch.ones(2)})
    with pytest.raises(dcp.api.CheckpointException, match="never overwritten"):
        write(tmp_path / "step-5", {"model.x": torch.zeros(2)})
    loaded = torch.zeros(2)
    read(tmp_path / "step-5", {"model.x": loaded})
    assert loaded.tolist() == [1, 1]


def test_damage_of_every_kind_is_refused_in_one_line_that_names_the_place(tmp_path):
    kinds, missed = count_undetected(3 * len(DAMAGES), tmp_path, seed=1)
    assert missed == []
    assert len(kinds) == len(set(DAMAGES))


def test_dying_at_any_event_of_save_retention_and_export_loses_nothing(tmp_path):
    (outcomes,) = run_on_ranks(1, crash_points, tmp_path)
    assert [outcome for outcome in outcomes if outcome.problem] == []
    assert len(outcomes) > 10


ONE_FILE = "rank-00000.safetensors"

# Changes to a manifest whose hashes fit again: what somebody might write on purpose.
HOSTILE = {
    "a file elsewhere": ("files", {"../../secret.safetensors": {"bytes": 1, "xxh128": "0" * 32}}),
    "an absolute file": ("files", {"/etc/passwd": {"bytes": 1, "xxh128": "0" * 32}}),
    "a negative size": ("files", {"rank-00000.safetensors": {"bytes": -1, "xxh128": "0" * 32}}),
    "no boxes": ("tensors", {"model.x": {"dtype": "F32", "shape": [1 << 60], "boxes": []}}),
    "a box outside": (
        "tensors",
        {"model.x": {"dtype": "F32", "shape": [2], "boxes": [[[1], [2], ONE_FILE]]}},
    ),
    "an unknown dtype": ("tensors", {"model.x": {"dtype": "O", "shape": [], "boxes": []}}),
    "a shape of words": ("tensors", {"model.x": {"dtype": "F32", "shape": "ab", "boxes": []}}),
    "another version": ("version", 99),
    "another format": ("format", "pickle"),
    "tensors that are a list": ("tensors", []),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_are_refused(tmp_path, name):
    place = write(tmp_path / "step-5", {"model.x": torch.ones(2)})
    key, value = HOSTILE[name]
    forge(place, {**json.loads((place / "manifest.json").read_text()), key: value})
    with pytest.raises(CheckpointError, match=r"manifest\.json: "):
        read_manifest(place)


def forge(place, content):
    """Write a manifest, with sums that fit."""
    data = json.dumps(content).encode()
    (place / "manifest.json").write_bytes(data)
    *lines, _ = (place / "XXH128SUMS").read_text().splitlines()
    lines.append(f"{xxhash.xxh3_128_hexdigest(data)}  manifest.json")
    (place / "XXH128SUMS").write_text("\n".join(lines) + "\n")


def test_json_without_end_is_refused(tmp_path):
    place = write(tmp_path / "step-5", {"model.x": torch.ones(2)})
    forge(place, None)
    (place / "manifest.json").write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError):
        read_manifest(place)


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path):
    place = write(tmp_path / "step-5", {"model.x": torch.ones(2)})
    (place / "rank-00000.safetensors").unlink()
    os.mkfifo(place / "rank-00000.safetensors")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="not a regular file"):
        verify(place)
    assert time.monotonic() - start < 60
