"""Manifests and files with right sums and wrong content are refused, and an older one is used.

Sums are written anew after each change, as somebody would who edits a checkpoint by hand.
"""

import json
import math
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import xxhash

from checkpoint.errors import CheckpointError
from checkpoint.manifest import MANIFEST
from checkpoint.verify import read_manifest, verify
from tests.support.checkpoint_runs import run_in
from tests.support.forged_checkpoints import GONE, changed, forge, manifest_of
from tests.support.ranks import run_on_ranks

SETTINGS = {
    "debug.seed": None,
    "model.name": "llama3",
    "model.flavor": "byte_debug",
    "model.hf_assets_path": "",
    "optimizer.lr": 0.1,
    "training.dataset": "words.txt",
    "training.global_batch_size": 8,
    "training.local_batch_size": 8,
    "training.seq_len": 32,
    "training.steps": 20,
    "training.stream_lanes": 64,
    "training.streaming": False,
    "validation.dataset": "",
}
DATA = "rank-00000.safetensors"
WEIGHT = "model.wq.weight"

# Values that are of a wrong type or out of every range.
WRONG: dict[str, Any] = {
    "null": None, "list": [], "table": {}, "NaN": math.nan, "1e400": math.inf, "negative": -1,
    "fraction": 2.5, "true": True, "half a character": "\ud800", "gone": GONE, "beyond": 10**30,
    "two lines": "a\nb",
}  # fmt: skip

# Where they are put; and what is right there or nobody's business.
PLACES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("step",): (),
    ("kind",): (),
    ("run",): (),
    ("created",): (),
    ("software",): ("table",),
    ("software", "torch"): ("gone",),
    ("world",): (),
    ("world", "ranks"): (),
    ("world", "device"): (),
    ("world", "threads"): (),
    ("world", "restarts"): (),
    ("world", "mesh"): ("table", "gone"),
    ("values",): (),
    ("values", "train_state"): (),
    ("values", "train_state", "step"): (),
    ("values", "train_state", "num_labels_seen"): (),
    ("values", "lr_scheduler"): (),
    ("values", "lr_scheduler", "last_epoch"): (),
    ("values", "dataloader"): (),
    ("values", "dataloader", "samples"): (),
    ("begun",): ("gone",),
    ("begun", "train_state", "step"): (),
    ("begun", "dataloader", "samples"): (),
    ("begun", "lr_scheduler", "last_epoch"): (),
    ("geometry",): ("table",),
    ("geometry", "wq.weight"): ("gone",),
    ("geometry", "wq.weight", "shape"): (),
    ("geometry", "wq.weight", "method"): (),
    ("geometry", "wq.weight", "grid"): ("gone",),
    ("geometry", "wq.weight", "grid", "merged_shape"): (),
    ("geometry", "wq.weight", "grid", "edges"): (),
    ("geometry", "wq.weight", "grid", "batch_dims"): (),
    ("geometry", "wq.weight", "options"): ("table", "gone"),
    ("settings",): ("table",),
    ("settings", "optimizer.lr"): (
        "null", "list", "table", "negative", "fraction", "true", "gone", "beyond", "two lines",
    ),
    ("settings", "debug.seed"): ("null", "negative", "beyond", "gone"),
    ("settings", "model.name"): ("gone",),
    ("settings", "training.steps"): ("gone",),
    ("settings", "training.seq_len"): ("gone",),
    ("settings", "training.streaming"): ("true", "gone"),
    ("settings", "training.local_batch_size"): ("gone",),
    ("settings", "training.global_batch_size"): ("negative", "gone"),
    ("num_samples",): ("null", "gone"),
    ("files",): (),
    ("files", DATA): (),
    ("files", DATA, "bytes"): (),
    ("files", DATA, "xxh128"): (),
    ("tensors",): (),
    ("tensors", WEIGHT): (),
    ("tensors", WEIGHT, "dtype"): (),
    ("tensors", WEIGHT, "shape"): (),
    ("tensors", WEIGHT, "boxes"): (),
}  # fmt: skip
# Numbers of the right type that contradict others.
EDGES = ("geometry", "wq.weight", "grid", "edges")
CONTRADICTING: list[tuple[tuple[str, ...], Any]] = [
    *((("values", "dataloader", "samples"), n) for n in (0, 7, 16, 23, 25, 32, 10**18)),
    *((("values", "train_state", "step"), n) for n in (0, 1, 2, 4, 10**15)),
    *((("values", "train_state", "num_labels_seen"), n) for n in (1, 7)),
    *((("values", "lr_scheduler", "last_epoch"), n) for n in (0, 2, 4, 10**12)),
    *((("begun", "dataloader", "samples"), n) for n in (8, 24, 32)),
    *((("begun", "train_state", "step"), n) for n in (1, 3, 4)),
    *((("begun", "lr_scheduler", "last_epoch"), n) for n in (1, 4)),
    *((("step",), n) for n in (0, 2, 4, 30)),
    *((("world", "ranks"), n) for n in (2, 3)),
    (("world", "mesh"), {"dp_shard": 2}),
    (("kind",), "model"),
    (("kind",), "some"),
    (("created",), "yesterday"),
    (("settings", "training.steps"), 2),
    (("settings", "training.global_batch_size"), 16),
    (("geometry", "wq.weight", "shape"), [12, 10]),
    (("geometry", "wq.weight", "shape"), [10, 12, 1 << 61]),
    (("geometry", "wq.weight", "grid", "merged_shape"), [120]),
    (("geometry", "wq.weight", "grid", "merged_shape"), [10, 13]),
    (("geometry", "wq.weight", "grid", "batch_dims"), 2),
    (EDGES, [[0, 4, 8, 10], [0, 4, 8]]),
    (EDGES, [[0, 4, 4, 10], [0, 4, 8, 12]]),
    (EDGES, [[0, 4, 10], [0, 4, 8, 12]]),
    (EDGES, [[0, 3, 6, 10], [0, 4, 8, 12]]),
    (EDGES, [[], []]),
    (EDGES, [[0, 4, 8, 10]]),
    (("files", DATA, "bytes"), 1),
    (("files", DATA, "xxh128"), "0" * 32),
    (("tensors", WEIGHT, "dtype"), "I32"),
    (("tensors", WEIGHT, "shape"), [12, 10]),
    (("tensors", WEIGHT, "boxes"), [[[0, 0], [12, 10], DATA]]),
    (("tensors", WEIGHT, "boxes"), [[[0, 0], [5, 12], DATA], [[4, 0], [5, 12], DATA]]),
    (("tensors", WEIGHT, "boxes"), [[[0, 0], [10, 12], "rank-00001.safetensors"]]),
    (("tensors", "model.more"), {"dtype": "F32", "shape": [2], "boxes": [[[0], [2], DATA]]}),
    (("tensors", "model.w\nq"), {"dtype": "F32", "shape": [0], "boxes": []}),
    (
        ("tensors", "model.huge"),
        {"dtype": "F32", "shape": [1 << 50], "boxes": [[[0], [1 << 50], DATA]]},
    ),
]  # fmt: skip
MANIFESTS = [
    *((place, value) for place, right in PLACES.items() for name, value in WRONG.items()
      if name not in right),
    *CONTRADICTING,
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of checkpoints of a run of one rank that saved steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(1, three_steps, folder)
    return folder / "checkpoint"


def three_steps(folder):
    with run_in(folder, settings=SETTINGS) as run:
        run.manager.load()
        run.train(3)


def copy_of(saved: Path, folder: Path) -> Path:
    """The newest checkpoint of a fresh copy of a folder of them."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    return folder / "step-3"


def test_every_wrong_value_of_a_manifest_is_one_line_that_names_file_and_key(saved, tmp_path):
    place = copy_of(saved, tmp_path / "copy")
    content = manifest_of(place)
    assert len(MANIFESTS) >= 500
    failed = []
    for where, value in MANIFESTS:
        forge(place, changed(content, where, value))
        try:
            verify(place)
        except CheckpointError as error:
            said = str(error)
            place_and_key = str(place) in said and named(where, said)
            if not place_and_key or "\n" in said or len(said) > 600:
                failed.append((where, value, said))
        else:
            failed.append((where, value, "accepted"))
    assert failed == []


def named(where: tuple[str, ...], said: str) -> bool:
    """Look in a message for the key, or for one that it contradicts."""
    witnesses = {
        "begun": ("begun", "values."),
        "settings": (where[-1], "values.dataloader.samples", "step: got 3, wanted 2"),
        "step": ("step", "renamed"),
        "geometry": ("geometry",),
        "kind": ("kind", "values"),
        "world": ("world", DATA),
        "files": ("files", DATA, "XXH128SUMS"),
        "tensors": ("tensors", DATA, "files"),
    }
    return any(word in said for word in witnesses.get(where[0], (where[-1], ".".join(where))))


def test_a_manifest_in_which_nothing_is_wrong_is_good(saved, tmp_path):
    place = copy_of(saved, tmp_path / "copy")
    content = manifest_of(place)
    for where, right in PLACES.items():
        for name in right:
            value = WRONG[name]
            if name in ("gone", "table") and where in (("settings",), ("geometry", "wq.weight")):
                continue  # refused when it is compared with a run
            forge(place, changed(content, where, value))
            verify(place)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a manifest"),
        (b"null", "format"),
        (b"[]", "format"),
        (b"[" * 100_000, "not a manifest"),
        (b'{"a": ' * 900 + b"1" + b"}" * 900, "format"),
        (b"\xff\xfe{\x00}\x00", "not a manifest"),
        (b"\x80\x04N.", "not a manifest"),
        (
            b'{"format": "titan-shampoo checkpoint", "version": 3, "version": 3}',
            "'version': repeated",
        ),
        (b'{"format": "titan-shampoo checkpoint", "version": [3]}', "format version [3]"),
        (b'{"format": "titan-shampoo checkpoint", "version": 3}', "files: missing"),
    ],
)  # fmt: skip
def test_what_is_no_manifest_at_all_is_one_line(saved, tmp_path, content, words):
    place = copy_of(saved, tmp_path / "copy")
    forge(place, content)
    with pytest.raises(CheckpointError) as raised:
        read_manifest(place)
    assert f"{place / MANIFEST}: " in str(raised.value)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_nesting_that_the_reader_of_json_allows_is_refused_too(saved, tmp_path):
    place = copy_of(saved, tmp_path / "copy")
    content = json.dumps(manifest_of(place)).encode()
    deep = b"[" * 600 + b"]" * 600
    forge(place, content.replace(b'"settings": {', b'"settings": {"deep": ' + deep + b", "))
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_manifest(place)


# ---- data files


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def zip_bomb() -> bytes:
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    return packed.getvalue()


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """A change of the header alone."""

    def apply(content: bytes) -> bytes:
        header, data = header_of(content)
        return with_header(change(header) or header, data)

    return apply


def set_entry(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[WEIGHT].__setitem__(key, value)


FILES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "seven bytes": lambda content: content[:7],
    "only a length": lambda _: struct.pack("<Q", 0),
    "a pickle": lambda _: pickle.dumps({"model": list(range(1000))}),
    "a zip bomb": lambda _: zip_bomb(),
    "a header beyond the end": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "a header of 2^63 bytes": lambda content: struct.pack("<Q", 1 << 63) + content[8:],
    "a header cut short": lambda content: struct.pack("<Q", 40) + content[8:],
    "a header that is a list": lambda content: with_header(b"[]", header_of(content)[1]),
    "a header without end": lambda content: with_header(b"{" + b'"a":[' * 50_000, content),
    "a header in UTF-16": lambda c: with_header(
        json.dumps(header_of(c)[0]).encode("utf-16"), header_of(c)[1]
    ),
    "no tensors": edited(lambda _: b"{}"),
    "a name twice": edited(lambda header: json.dumps(header).encode()[:-1] + b',"a":1,"a":1}'),
    "a tensor less": edited(lambda header: {k: v for k, v in header.items() if k != WEIGHT}),
    "a tensor more": edited(lambda header: header | {"model.more": header[WEIGHT]}),
    "another name": edited(lambda h: {k.replace(WEIGHT, "model.x"): v for k, v in h.items()}),
    "another dtype": edited(set_entry("dtype", "I32")),
    "an unknown dtype": edited(set_entry("dtype", "O")),
    "a dtype that is a list": edited(set_entry("dtype", ["F32"])),
    "another shape": edited(set_entry("shape", [12, 10])),
    "a shape of words": edited(set_entry("shape", "ab")),
    "a shape of fractions": edited(set_entry("shape", [10.0, 12])),
    "no offsets": edited(set_entry("data_offsets", None)),
    "offsets backwards": edited(set_entry("data_offsets", [480, 0])),
    "negative offsets": edited(set_entry("data_offsets", [-480, 0])),
    "offsets beyond the end": edited(set_entry("data_offsets", [1 << 40, (1 << 40) + 480])),
    "offsets of another tensor": edited(set_entry("data_offsets", [8, 488])),
    "offsets that are true": edited(set_entry("data_offsets", [True, 481])),
    "an entry that is null": edited(lambda header: header | {WEIGHT: None}),
    "metadata that are numbers": edited(lambda header: header | {"__metadata__": {"format": 1}}),
    "data cut short": lambda content: content[:-4],
    "more data": lambda content: content + b"more",
}  # fmt: skip


def damage_file(place: Path, name: str) -> None:
    """Put another file in place of the data, with a manifest and sums that fit it."""
    data = FILES[name]((place / DATA).read_bytes())
    (place / DATA).write_bytes(data)
    content = manifest_of(place)
    content["files"][DATA] = {"bytes": len(data), "xxh128": xxhash.xxh3_128_hexdigest(data)}
    forge(place, content)


@pytest.mark.parametrize("name", FILES)
def test_a_data_file_that_is_none_is_refused_before_it_is_opened(saved, tmp_path, name):
    place = copy_of(saved, tmp_path / "copy")
    damage_file(place, name)
    with pytest.raises(CheckpointError) as raised:
        verify(place)
    assert str(place / DATA) in str(raised.value) or f"files.{DATA}" in str(raised.value)
    assert "\n" not in str(raised.value)


# ---- what a run does


def in_parts(function: Callable[..., list[Any]], folder: Path, cases: list[Any]) -> list[Any]:
    """What a function finds, in processes for a few cases each: process groups are kept in each."""
    parts = (cases[start : start + 40] for start in range(0, len(cases), 40))
    return [
        one for part in parts for one in run_on_ranks(1, function, folder, part, timeout=300)[0]
    ]


def loads(folder: Path, cases: list[Any], **config: Any) -> list[tuple[Any, str]]:
    """Cases in which a run does not resume as it should from a damaged copy of its folder."""
    saved = folder / "checkpoint"
    good = {step: state_after(folder, step) for step in (0, 2, 3)}
    wrong = []
    for case in cases:
        place = copy_of(saved, folder / "copy" / "checkpoint")
        apply(place, case)
        problem = resumed_problem(folder / "copy", good, **config)
        if problem is not None:
            wrong.append((case, problem))
    return wrong


def apply(place: Path, case: Any) -> None:
    if isinstance(case, str):
        damage_file(place, case)
    else:
        where, name, value = case
        forge(place, changed(manifest_of(place), where, WRONG[name] if name else value))


def state_after(folder: Path, step: int) -> tuple[str, str]:
    """All state of a run that has loaded a good step; 0: of one that has loaded none."""
    with run_in(folder, settings=SETTINGS, load_only=True) as run:
        if step:
            run.manager.load(step)
        return run.local_bytes(), repr(run.manager._state.values())


def resumed_problem(folder: Path, good: dict[int, Any], **config: Any) -> str | None:
    """None if an older good checkpoint was loaded whole, or all was refused and nothing changed."""
    with run_in(folder, settings=SETTINGS, **config) as run:
        try:
            run.manager.load()
        except CheckpointError as error:
            found, expected = run.local_bytes(), good[0][0]
            if "\n" in str(error) or config.get("fallback", True):
                return str(error)
            return None if found == expected else f"half loaded: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if (run.local_bytes(), repr(run.manager._state.values())) != good[2]:
            return f"other state, of step {run.progress.value}"
    names = {path.name for path in (folder / "checkpoint").glob("step-*")}
    return None if names == {"step-1", "step-2", "step-3.bad"} else f"names: {names}"


def portable(cases: list[tuple[tuple[str, ...], Any]]) -> list[Any]:
    """Cases that can be sent to another process, which has no ``GONE`` of ours."""
    by_identity = {id(value): name for name, value in WRONG.items()}
    return [(where, by_identity.get(id(value)), value if id(value) not in by_identity else None)
            for where, value in cases]  # fmt: skip


# A renamed checkpoint is refused by its name, whoever asks.
QUICK = [
    *(((*place,), WRONG[name]) for place in (
        ("values", "dataloader", "samples"), ("values", "train_state", "step"),
        ("values", "lr_scheduler", "last_epoch"), ("values",), ("geometry",), ("settings",),
        ("world",), ("step",),
    ) for name in ("null", "NaN", "negative") if place != ("values",) or name != "NaN"),
    *CONTRADICTING[::4],
]  # fmt: skip


def test_a_run_falls_back_to_the_newest_good_checkpoint_and_loads_all_of_it(saved):
    cases = [*portable(QUICK), "a pickle", "a zip bomb", "another dtype", "a tensor less"]
    assert in_parts(loads, saved.parent, cases) == []


def refused(folder, cases):
    return loads(folder, cases, fallback=False)


def test_a_run_that_may_not_fall_back_refuses_and_changes_nothing(saved):
    cases = [*portable(QUICK[::5]), "a pickle", "another shape"]
    assert in_parts(refused, saved.parent, cases) == []


@pytest.mark.slow
def test_a_run_falls_back_from_every_wrong_value_and_file(saved):
    assert in_parts(loads, saved.parent, [*portable(MANIFESTS), *FILES]) == []


# ---- changes that nobody chose


def leaves(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a manifest, tables and lists too."""
    yield where
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in items:
            yield from leaves(one, (*where, key))


def drawn(draw: random.Random, old: Any) -> Any:
    numbers = (0, 1, 2, 7, -1, -5, 10**18, 1 << 63, 10**40, 1.5, math.inf, -math.inf, math.nan)
    others: tuple[Any, ...] = (
        None,
        [],
        {},
        "",
        "x",
        "\ud800",
        "../x",
        True,
        False,
        [1],
        {"a": 1},
        [[[]]],
    )
    near = [old + 1, old - 1, old * 2] if type(old) is int else []
    return draw.choice([*numbers, *others, *near * 3, GONE])


def sweep(folder: Path, seeds: list[int]) -> list[Any]:
    """Random changes after which a run ends in a traceback, or goes on with something else."""
    saved, wrong = folder / "checkpoint", []
    content = manifest_of(saved / "step-3")
    places = [where for where in leaves(content) if where and where[0] != "tensors"]
    places += [where for where in leaves(content) if where[:1] == ("tensors",)][::20]
    good = {step: state_after(folder, step) for step in (0, 2, 3)}
    for seed in seeds:
        draw = random.Random(seed)
        where = draw.choice(places)
        old = content
        for key in where:
            old = old[key]
        value = drawn(draw, old)
        place = copy_of(saved, folder / "copy" / "checkpoint")
        forge(place, changed(content, where, value))
        problem = outcome(folder / "copy", good)
        if problem is not None:
            wrong.append((where, "gone" if value is GONE else value, problem))
    return wrong


def outcome(folder: Path, good: dict[int, Any]) -> str | None:
    with run_in(folder, settings=SETTINGS, load_only=True) as run:
        try:
            run.manager.load()
        except CheckpointError as error:
            same = run.local_bytes() == good[0][0]
            return None if same and "\n" not in str(error) else f"half loaded: {error!r}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        found = (run.local_bytes(), repr(run.manager._state.values()))
        return None if found in (good[2], good[3]) else "something else was loaded"


def test_no_random_change_of_a_manifest_is_trained_from(saved):
    assert in_parts(sweep, saved.parent, [*range(40)]) == []


@pytest.mark.slow
def test_none_of_many_random_changes_of_a_manifest_is_trained_from(saved):
    assert in_parts(sweep, saved.parent, [*range(2000)]) == []
