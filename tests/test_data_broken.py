"""Rows, names and files that nobody expects: counted, named in one line, and never a traceback."""

import gzip
import io
import json
import logging
import os
import socket
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from titan_shampoo.data import DataError, UnreadableSampleError, printable
from titan_shampoo.data.images import ImageFiles, open_images
from titan_shampoo.data.loader import EvaluationLoader
from titan_shampoo.data.sources import is_held_out, open_corpus
from titan_shampoo.data.streams import TextStream
from titan_shampoo.data.text import TextDataset
from titan_shampoo.data.tokenizer import ByteTokenizer
from titan_shampoo.titan.console import _Console

KEY = "training.dataset"
TEXTS = [f"number {number} of the documents" for number in range(60)]
ROWS = [json.dumps({"text": text}) for text in TEXTS]

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def in_memory(source, max_bad_fraction=0.0):
    rows = open_corpus(str(source), key=KEY, max_bad_fraction=max_bad_fraction).rows
    return [row["text"] for row in rows]


def streamed(source, max_bad_fraction=0.0):
    stream = TextStream(
        str(source), tokenizer=ByteTokenizer(), seq_len=8, num_shards=2, hold_out=False,
        max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    return [text for shard in range(2) for text in stream._texts(shard)]


both = pytest.mark.parametrize("read", [in_memory, streamed])


def json_lines(folder, row, name="a.jsonl"):
    """A folder whose one file has ``row`` as its 31st line."""
    folder.mkdir(exist_ok=True)
    lines = [line.encode() for line in ROWS]
    lines.insert(30, row)
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return folder


def said(caplog):
    """What was logged, each a line that a strict stream can encode."""
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("titan_shampoo")]
    for message in messages:
        assert message.isprintable()
        message.encode()
    return messages


def refusal(read, *args, **options):
    with pytest.raises(DataError) as raised:
        read(*args, **options)
    assert str(raised.value).isprintable()
    return str(raised.value)


BROKEN = {
    "no JSON": b"{bad",
    "cut short": b'{"text": "a',
    "something behind": b'{"text": "a"} b',
    "lone surrogate": rb'{"text": "x \ud83d y"}',
    "two surrogates in the wrong order": rb'{"text": "\ude00\ud83d"}',
    "bytes of a surrogate": b'{"text": "x \xed\xa0\xbd y"}',
    "byte of a name": rb'{"text": "\udce9"}',
    "Latin-1": b'{"text": "caf\xe9"}',
    "nested": b"[" * 100_000,
    "nested beside a text": b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "objects nested": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "integer of 5000 digits": b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
    "NUL": rb'{"text": "a\u0000b"}',
    "raw NUL": b'{"text": "a\0b"}',
    "null": b'{"text": null}',
    "list": b'{"text": ["a", "b"]}',
    "number": b'{"text": 5}',
    "true": b'{"text": true}',
    "object": b'{"text": {"a": "b"}}',
    "no such key": b'{"txt": "a"}',
    "no key": b"{}",
    "100,000 keys": json.dumps(dict.fromkeys(map(str, range(100_000)), 1)).encode(),
    "keys in two lines": rb'{"a\nb": 1, "\ud800": 2}',
    "last of two": b'{"text": "a", "text": null}',
    "row that is a list": b'["a"]',
    "row that is a string": b'"a"',
    "row that is null": b"null",
    "row that is not a number": b"NaN",
}


@both
@pytest.mark.parametrize("row", BROKEN.values(), ids=BROKEN)
def test_a_broken_row_is_counted_and_named_by_file_and_line(tmp_path, caplog, read, row):
    folder = json_lines(tmp_path / "rows", row)
    with caplog.at_level(logging.WARNING):
        assert sorted(read(folder, max_bad_fraction=0.1)) == sorted(TEXTS)
    (message,) = said(caplog)
    assert "a.jsonl:31: " in message
    assert len(message) < 1000
    assert "max_bad_fraction = 0 allows, such as" in refusal(read, folder)
    assert "a.jsonl:31: " in refusal(read, folder)


WHOLE = {
    "byte order mark": (b'\xef\xbb\xbf{"text": "whole"}', "whole"),
    "carriage return": (b'{"text": "whole"}\r', "whole"),
    "pair of surrogates": (rb'{"text": "\ud83d\ude00"}', "😀"),
    "infinity": (b'{"text": "whole", "x": Infinity, "y": 1e999}', "whole"),
    "last of two": (b'{"text": null, "text": "whole"}', "whole"),
    "empty text": (b'{"text": ""}', None),
    "blank": (b"  \t", None),
}


@both
@pytest.mark.parametrize(("row", "text"), WHOLE.values(), ids=WHOLE)
def test_an_odd_row_that_is_whole_is_read(tmp_path, caplog, read, row, text):
    folder = json_lines(tmp_path / "rows", row)
    assert sorted(read(folder)) == sorted([*TEXTS, text] if text else TEXTS)
    assert said(caplog) == []


def test_a_row_is_held_out_alike_whatever_is_broken_beside_it(tmp_path):
    (tmp_path / "whole.jsonl").write_text("\n".join(ROWS))
    json_lines(tmp_path, BROKEN["lone surrogate"])
    whole, broken = (
        list(open_corpus(str(tmp_path / name), key=KEY, max_bad_fraction=0.1).rows)
        for name in ("whole.jsonl", "a.jsonl")
    )
    assert whole == broken
    assert [row["held_out"] for row in whole] == [is_held_out(text) for text in TEXTS]


def strings(values):
    """An Arrow column of strings, which are not checked to be UTF-8."""
    return pa.array(values, pa.binary()).view(pa.string())


def parquet(folder, column, name="a.parquet"):
    folder.mkdir()
    with (folder / name).open("wb") as file:  # Arrow itself refuses names that are not UTF-8
        pq.write_table(pa.table({"text": column, "number": range(len(column))}), file)
    return folder


RAW = [text.encode() for text in TEXTS]


@both
@pytest.mark.parametrize(
    "value",
    [b"x \xed\xa0\xbd y", b"caf\xe9", b"\xff\xfea\0", b"a\0b", None],
    ids=["surrogate", "Latin-1", "UTF-16", "NUL", "null"],
)
def test_a_broken_row_of_a_table_is_counted_and_named(tmp_path, caplog, read, value):
    folder = parquet(tmp_path / "rows", strings([*RAW[:30], value, *RAW[30:]]))
    with caplog.at_level(logging.WARNING):
        assert sorted(read(folder, max_bad_fraction=0.1)) == sorted(TEXTS)
    (message,) = said(caplog)
    assert "row 30: " in message
    assert "row 30: " in refusal(read, folder)


@both
@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(["", *TEXTS, ""]),
    ],
    ids=["large", "dictionary", "empty rows"],
)
def test_every_form_of_a_string_column_is_read(tmp_path, read, column):
    assert sorted(read(parquet(tmp_path / "rows", column))) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("column", "instead"),
    [
        (pa.array([[text] for text in TEXTS]), "but a list"),
        (pa.array(range(60)), "but a number"),
        (pa.array([{"a": "b"}] * 60), "but an object"),
        (pa.nulls(60), "but null"),
    ],
    ids=["list", "number", "object", "null"],
)
def test_a_column_of_another_type_is_named(tmp_path, column, instead):
    folder = parquet(tmp_path / "rows", column)
    assert refusal(in_memory, folder, max_bad_fraction=0.5).endswith(instead)
    stream = TextStream(
        str(folder), tokenizer=ByteTokenizer(), seq_len=8, num_shards=1, max_bad_fraction=0.5
    )
    message = refusal(next, stream.windows(0))
    assert "stream shard 0 of 1 has no text to train on (60 rows were skipped)" in message


def test_texts_among_other_types_in_json_are_decoded(tmp_path):
    # As datasets stores them: each value as JSON.
    rows = [*ROWS, '{"text": 5}', '{"text": ["a"]}']
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.json").write_text("\n".join(rows))
    assert sorted(streamed(tmp_path / "rows", 0.1)) == sorted(TEXTS)


def cut_parquet(folder):
    parquet(folder, pa.array(TEXTS))
    raw = (folder / "a.parquet").read_bytes()
    (folder / "a.parquet").write_bytes(raw[: len(raw) // 2])


def overwritten_parquet(folder):
    parquet(folder, pa.array([text * 50 for text in TEXTS]))
    with (folder / "a.parquet").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 100)


def empty_file_beside(folder):
    parquet(folder, pa.array(TEXTS))
    (folder / "b.parquet").touch()


@both
@pytest.mark.parametrize("damage", [cut_parquet, overwritten_parquet, empty_file_beside])
def test_a_damaged_table_is_refused_by_its_source(tmp_path, read, damage):
    damage(tmp_path / "rows")
    message = refusal(read, tmp_path / "rows", max_bad_fraction=0.1)
    assert str(tmp_path / "rows") in message
    assert "DatasetGenerationError" not in message  # but what was the matter


def test_a_stream_that_cannot_go_on_names_its_file(tmp_path):
    (tmp_path / "rows").mkdir()
    with gzip.open(tmp_path / "rows" / "a.jsonl.gz", "wb") as file:
        file.write(b"\n".join([*(line.encode() for line in ROWS), BROKEN["no JSON"]]))
    message = refusal(streamed, tmp_path / "rows", max_bad_fraction=0.1)
    assert "file 1 of 1: cannot be read from row 0 on (ArrowInvalid: JSON parse error" in message
    assert message.endswith("repair or remove the file")


@both
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_whose_name_is_not_utf8_is_read(tmp_path, read, suffix):
    if suffix == ".jsonl":
        json_lines(tmp_path / "rows", b"", NOT_UTF8 + suffix)
    else:
        parquet(tmp_path / "rows", pa.array(TEXTS), NOT_UTF8 + suffix)
    assert sorted(read(tmp_path / "rows")) == sorted(TEXTS)


def test_a_broken_row_in_a_file_of_such_a_name_is_named(tmp_path, caplog):
    folder = json_lines(tmp_path / NOT_UTF8, BROKEN["null"], f"{NOT_UTF8}\n.jsonl")
    with caplog.at_level(logging.WARNING):
        assert in_memory(folder, 0.1) == TEXTS
    assert r"caf\udce9/caf\udce9\n.jsonl:31: " in said(caplog)[0]


def test_texts_are_tokenised_whatever_their_names_are(tmp_path):
    folder = tmp_path / NOT_UTF8
    folder.mkdir()
    for number in range(40):
        (folder / f"{NOT_UTF8}{number}\n.txt").write_text("hello")
    parts = [
        TextDataset(str(folder), tokenizer=ByteTokenizer(), seq_len=2, part=part).num_tokens
        for part in ("train", "validation", "all")
    ]
    names = [f"{NOT_UTF8}{number}\n.txt" for number in range(40)]
    held_out = sum(map(is_held_out, names))
    assert parts == [6 * (40 - held_out), 6 * held_out, 6 * 40]
    one = TextDataset(str(folder / names[0]), tokenizer=ByteTokenizer(), seq_len=2, part="all")
    assert one.num_tokens == 6


@both
def test_a_folder_that_only_datasets_reads_must_have_a_name_in_utf8(tmp_path, read):
    folder = parquet(tmp_path / NOT_UTF8, pa.array(TEXTS))
    assert refusal(read, folder).endswith(
        "the path is not UTF-8, as the datasets library needs it; rename the folder"
    )


def fifo(path):
    os.mkfifo(path)


def dangling(path):
    path.symlink_to("nowhere")


def link_to_itself(path):
    path.symlink_to(path.name)


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as unix:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path has at most 107 characters
        unix.bind(path.name)
        os.chdir(here)


others = pytest.mark.parametrize("make", [fifo, dangling, link_to_itself, bound_socket])


def text_folder(tmp_path, num_files=30):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(num_files):
        (folder / f"{number:02}.txt").write_text(f"text {number}")
    return folder


@others
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x\n.parquet"])
def test_what_is_no_file_in_a_folder_of_texts_is_counted(tmp_path, caplog, make, name):
    folder = text_folder(tmp_path)
    make(folder / name)
    with caplog.at_level(logging.WARNING):
        assert in_memory(folder, 0.01) == [f"text {number}" for number in range(30)]
    (message,) = said(caplog)
    assert (
        f"skipped 1 of 31 files that cannot be read, first {printable(folder / name)}: " in message
    )
    assert printable(folder / name) in refusal(in_memory, folder)


@others
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_is_no_file_in_a_stream_is_counted(tmp_path, caplog, make, suffix):
    if suffix == ".jsonl":
        folder = json_lines(tmp_path / "rows", b"")
    else:
        folder = parquet(tmp_path / "rows", pa.array(TEXTS))
    make(folder / f"x{suffix}")
    for read in (in_memory, streamed):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert sorted(read(folder, 0.01)) == sorted(TEXTS)
        assert any("skipped 1 of 2 files that cannot be read" in line for line in said(caplog))
        assert f"x{suffix}: " in refusal(read, folder)


def test_a_file_without_the_right_to_read_it_counts_until_there_is_one(
    tmp_path, caplog, monkeypatch
):
    folder = text_folder(tmp_path)
    closed = folder / "03.txt"
    access = os.access
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
        tokens = TextDataset(
            str(folder), tokenizer=ByteTokenizer(), seq_len=2, part="all", max_bad_fraction=0.01
        ).num_tokens
    assert "03.txt: Permission denied" in said(caplog)[0]
    again = TextDataset(
        str(folder), tokenizer=ByteTokenizer(), seq_len=2, part="all", max_bad_fraction=0.01
    )
    assert again.num_tokens == tokens + len("text 3") + 1


def test_folders_with_names_of_files_are_folders(tmp_path, caplog):
    folder = text_folder(tmp_path, 2)
    (folder / "x.txt").mkdir()
    (folder / "y.jsonl").mkdir()
    (folder / "z.parquet").mkdir()
    (folder / "x.txt" / "a.txt").write_text("inside")
    assert in_memory(folder) == ["text 0", "text 1", "inside"]
    assert said(caplog) == []


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path, caplog):
    folder = text_folder(tmp_path, 2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("linked")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    for number, target in enumerate((".", "..", "/", "../texts")):
        (folder / f"loop{number}").symlink_to(target)
    with caplog.at_level(logging.WARNING):
        assert in_memory(folder) == ["text 0", "text 1", "linked"]
    (message,) = said(caplog)
    assert "did not follow 5 links that lead back to a folder above them, first" in message


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    folder = text_folder(tmp_path)
    (folder / "closed").mkdir()
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert refusal(in_memory, folder, 0.5).endswith("closed: cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"a\0b\nkept\n", "kept\n"),
        (b"caf\xe9\nkept\n", "kept\n"),
        (b"\xed\xa0\xbd\nkept\n", "kept\n"),
        ("größer\n".encode("utf-16-le"), None),
        ("größer\n".encode("utf-16"), None),
        (b"\xef\xbb\xbfwith a mark\n", "\ufeffwith a mark\n"),
        (b"", None),
    ],
    ids=[
        "NUL",
        "Latin-1",
        "surrogate",
        "UTF-16 without a mark",
        "UTF-16",
        "UTF-8 with one",
        "empty",
    ],
)
def test_lines_that_are_no_text_are_left_out_of_a_file(tmp_path, caplog, raw, text):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(raw)
    (tmp_path / "texts" / "b.txt").write_text("beside")
    with caplog.at_level(logging.WARNING):
        assert in_memory(tmp_path / "texts", 0.5) == [*([text] if text else []), "beside"]
    assert len(said(caplog)) == (text == "kept\n" or raw[1:2] in (b"\0", b"\xfe"))
    if text == "kept\n":
        assert (
            "a.txt: skipped 1 of 2 lines that are not UTF-8 text, first line 1" in said(caplog)[0]
        )


@both
@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("/dev/null", "is neither a file nor a folder"),
        ("/dev/zero", "is neither a file nor a folder"),
        ("{}/fifo", "is neither a file nor a folder"),
        ("{}/socket", "is neither a file nor a folder"),
        ("{}/a\0b", "has NUL, which neither paths nor names of data sets have"),
        ("a\0b", "has NUL, which neither paths nor names of data sets have"),
        ("x" * 5000, "cannot be looked for: File name too long"),
        ("/" + "x" * 5000, "cannot be looked for: File name too long"),
        ("{}/dangling", "is a link that leads nowhere: nowhere"),
        ("{}/itself", "is a link that leads nowhere: itself"),
        ("~nobody_is_called_so/x", "Could not determine home directory."),
        ("{}/\udce9\n.txt", "no such file or folder"),
    ],
    ids=lambda value: printable(value)[:12],
)
def test_a_source_that_can_hold_no_data_is_refused(tmp_path, read, source, problem):
    fifo(tmp_path / "fifo")
    dangling(tmp_path / "dangling")
    link_to_itself(tmp_path / "itself")
    bound_socket(tmp_path / "socket")
    message = refusal(read, source.format(tmp_path))
    assert message.startswith(
        printable(f'training.dataset = "{source.format(tmp_path)}": {problem}')
    )


@both
def test_a_folder_may_have_a_colon_in_its_name(tmp_path, read):
    folder = json_lines(tmp_path / "rows:2", b"")
    assert sorted(read(folder)) == sorted(TEXTS)


def picture(path, red=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (red, 0, 0)).save(path)


@pytest.mark.parametrize("parts", [("train", "val"), ("",)])
def test_classes_whose_names_are_not_utf8_are_classes(tmp_path, parts):
    for part in parts:
        for name in ("cat", NOT_UTF8, f"{NOT_UTF8}\n"):
            for number in range(30):
                picture(tmp_path / part / name / f"{NOT_UTF8}{number}.png", number)
    images = [open_images(str(tmp_path), part=part, key=KEY) for part in ("train", "validation")]
    assert images[0].classes == images[1].classes == [NOT_UTF8, f"{NOT_UTF8}\n", "cat"]
    assert sum(map(len, images)) == 90 * len(parts)
    for part in images:
        assert {part[index][1] for index in range(len(part))} <= {0, 1, 2}


def test_messages_about_such_classes_are_printable(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    picture(one / "cat" / "1.png")
    (one / f"{NOT_UTF8}\n").mkdir()
    message = refusal(open_images, str(one), part="train", key=KEY)
    assert rf'class "caf\udce9\n" has no images in {one}/caf\udce9\n' in message
    picture(other / NOT_UTF8 / "1.png")
    message = refusal(
        open_images, str(other), part="train", key=KEY, hold_out=False, classes=["cat"]
    )
    assert r'class "caf\udce9" is not among the 1' in message


@pytest.mark.timeout(60)
@others
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_is_no_file_counts_as_a_bad_sample(tmp_path, caplog, make, num_workers):
    for number in range(1, 8):
        picture(tmp_path / "cat" / f"{number}.png")
    make(tmp_path / "cat" / f"0{NOT_UTF8}\n.png")
    images = open_images(str(tmp_path), part="train", key=KEY, hold_out=False)
    assert len(images) == 8
    with pytest.raises(UnreadableSampleError, match=r"0caf\\udce9\\n.png: OSError: ") as raised:
        images[0]
    assert str(raised.value).isprintable()
    strict = EvaluationLoader(
        Pixels(images), local_batch_size=2, dp_rank=0, dp_world_size=1, num_workers=num_workers
    )
    assert r"0caf\udce9\n.png: OSError: " in refusal(list, strict)
    lenient = EvaluationLoader(
        Pixels(images), local_batch_size=2, dp_rank=0, dp_world_size=1, max_bad_fraction=0.01
    )
    assert len(list(lenient)) == 4
    assert lenient.skipped.count == 1


class Pixels:
    """Images as numbers."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return image.getpixel((0, 0))[0], label

    def shortage(self, num_needed):
        return f"fewer than {num_needed}"


def test_a_worker_that_finds_nothing_readable_says_so_in_one_line(tmp_path):
    for number in range(3):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / f"{number}{NOT_UTF8}\n.png").write_bytes(b"no image")
    images = open_images(str(tmp_path), part="train", key=KEY, hold_out=False)
    loader = EvaluationLoader(
        Pixels(images), local_batch_size=1, dp_rank=0, dp_world_size=1, num_workers=1
    )
    message = refusal(list, loader)
    assert message.startswith("3 samples in a row cannot be read, such as ")
    assert r"0caf\udce9\n.png" in message


def test_loops_of_links_show_no_image_twice(tmp_path, caplog):
    picture(tmp_path / "cat" / "1.png")
    for number, target in enumerate((".", "..", "../cat")):
        (tmp_path / "cat" / f"loop{number}").symlink_to(target)
    with caplog.at_level(logging.WARNING):
        assert len(open_images(str(tmp_path), part="train", key=KEY, hold_out=False)) == 1
    assert "did not follow 3 links" in said(caplog)[0]


def test_a_class_that_is_a_link_to_nothing_is_refused(tmp_path):
    picture(tmp_path / "cat" / "1.png")
    dangling(tmp_path / "dog")
    message = refusal(open_images, str(tmp_path), part="train", key=KEY)
    assert message == f"{tmp_path}/dog: a link that leads nowhere, which may be a class; remove it"


@pytest.mark.parametrize("label", [-1, 2, 10**12, float("nan")])
def test_an_image_without_a_class_is_a_bad_sample(tmp_path, label):
    picture(tmp_path / "1.png")
    images = ImageFiles(
        "here", ["cat", "dog"], [label], lambda _: "row 0", lambda _: str(tmp_path / "1.png")
    )
    with pytest.raises(UnreadableSampleError, match="row 0: ValueError: "):
        images[0]


def test_the_console_takes_what_no_encoding_has(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8", errors="strict"))
    console = _Console()
    record = logging.LogRecord("titan_shampoo", logging.WARNING, "", 0, "%s", (NOT_UTF8,), None)
    console.emit(record)
    console.flush()
    assert raw.getvalue() == b"warning: caf\\udce9\n"
