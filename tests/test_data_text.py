"""Promises of the text data: stable parts, one tokenisation per machine, refusals in a line."""

import errno
import json
import logging
import multiprocessing
import pickle
import sysconfig
import time
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_shampoo.data import DataError, sources, text
from titan_shampoo.data.sources import PYTHON_STDLIB, open_corpus
from titan_shampoo.data.text import TextDataset
from titan_shampoo.data.tokenizer import ByteTokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """200 short text files."""
    root = tmp_path / "data" / "texts"
    root.mkdir(parents=True)
    for number in range(200):
        (root / f"{number}.txt").write_text(f"text number {number}\n" * 3)
    return root


class WideTokenizer:
    """Ids above 65,535."""

    def encode(self, text: str) -> list[int]:
        return [100_000 + ord(character) for character in text]

    def get_vocab_size(self) -> int:
        return 101_000


class LoggingTokenizer(ByteTokenizer):
    """Leaves a line in a file for each document that it encodes."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def encode(self, text: str) -> list[int]:
        with self.log.open("a") as log:
            log.write("one document\n")
        return super().encode(text)


def open_text(source, part="train", seq_len=8, tokenizer=None):
    return TextDataset(
        str(source), tokenizer=tokenizer or ByteTokenizer(), seq_len=seq_len, part=part
    )


def all_labels(dataset):
    return torch.cat([dataset[index][1] for index in range(len(dataset))]).tolist()


def documents(source, part):
    """The texts of a part, read back from tokens."""
    tokens = bytes(all_labels(open_text(source, part, seq_len=1)))
    return tokens.decode().split("\0")


@given(length=st.integers(10, 200), seq_len=st.integers(1, 20))
def test_every_token_but_the_first_is_predicted_once(tmp_path_factory, length, seq_len):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(chr(33 + number % 90) for number in range(length)))
    stream = ByteTokenizer().encode(file.read_text()[: length - length // 20])
    if len(stream) <= seq_len:
        return
    dataset = open_text(file, seq_len=seq_len)
    num_windows = (len(stream) - 1) // seq_len
    assert len(dataset) == num_windows
    assert all_labels(dataset) == stream[1 : num_windows * seq_len + 1]
    for index in range(num_windows):
        inputs, labels = dataset[index]
        assert torch.equal(inputs[1:], labels[:-1])


def test_training_and_validation_files_are_disjoint_and_complete(folder):
    train, validation = documents(folder, "train"), documents(folder, "validation")
    assert 2 <= len(validation) <= 25
    assert not set(train[1:-1]) & set(validation[1:-1])
    assert len(train) + len(validation) == len(documents(folder, "all")) + 1


def test_a_held_out_file_stays_held_out_when_files_are_added(folder):
    before = set(documents(folder, "validation")[1:-1])
    for number in range(200, 300):
        (folder / f"{number}.txt").write_text(f"text number {number}\n" * 3)
    assert before <= set(documents(folder, "validation")[1:-1])


def test_a_single_text_is_held_out_from_its_last_twentieth_at_a_line_start(tmp_path):
    file = tmp_path / "text.txt"
    lines = [f"line {number}\n" for number in range(1000)]
    file.write_text("".join(lines))
    (head, *_), (tail, *_) = documents(file, "train"), documents(file, "validation")
    first_held_out = lines.index("l" + tail.splitlines(keepends=True)[0])
    assert 940 <= first_held_out <= 955
    assert "l" + tail == "".join(lines[first_held_out:])
    assert "l" + head == "".join(lines[:first_held_out])


def test_json_lines_are_documents(tmp_path):
    file = tmp_path / "rows.jsonl"
    texts = [f"row {number}\nwith two lines, größer" for number in range(100)]
    file.write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in texts))
    parts = [documents(file, "train"), documents(file, "validation")]
    # The first byte of a stream is never a label.
    assert sorted(row for part in parts for row in part if row.startswith("row")) == sorted(
        text for text in texts if text[1:] not in (parts[0][0], parts[1][0])
    )
    assert len(parts[1]) > 1


def test_the_standard_library_is_real_text_with_a_twentieth_held_out():
    train, validation = (open_text(PYTHON_STDLIB, part) for part in ("train", "validation"))
    assert train.num_tokens > 8_000_000
    assert 0.03 < validation.num_tokens / train.num_tokens < 0.08


def test_installed_packages_are_no_part_of_the_standard_library(tmp_path, monkeypatch):
    for file in ("os.py", "site-packages/torch.py", "dist-packages/numpy.py", "notes.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(file)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    rows = open_corpus(PYTHON_STDLIB, key="training.dataset").rows
    assert "".join(row["text"] for row in rows) == "os.py"


def test_text_is_tokenised_once(folder, monkeypatch):
    first = all_labels(open_text(folder))
    monkeypatch.setattr(text, "_write_tokens", None)
    assert all_labels(open_text(folder)) == first


def test_a_changed_file_is_tokenised_anew(folder):
    before = open_text(folder, "all").num_tokens
    (folder / "0.txt").write_text("longer than before\n" * 9)
    assert open_text(folder, "all").num_tokens > before


def test_tokenizers_do_not_share_tokens(folder):
    assert open_text(folder, "all")[0][0].tolist() == list(b"text num")
    wide = open_text(folder, "all", tokenizer=WideTokenizer())
    assert torch.equal(wide[0][0], torch.tensor([100_000 + ord(c) for c in "text num"]))


def test_processes_that_start_together_tokenise_once(tmp_path):
    file, log = tmp_path / "text.txt", tmp_path / "log"
    file.write_text("some text\n" * 1000)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    results = context.SimpleQueue()

    def load():
        barrier.wait(30)
        results.put(len(open_text(file, "all", tokenizer=LoggingTokenizer(log))))

    workers = [context.Process(target=load) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert len({results.get() for _ in workers}) == 1
    for worker in workers:
        worker.join(30)
    assert log.read_text().splitlines() == ["one document"] * 2  # its head and its tail


def test_tokens_of_a_killed_process_are_not_taken_for_complete(folder, monkeypatch):
    class KilledError(BaseException):
        """Not caught by anything."""

    def killed(file, *_):
        file.write(b"half of the tok")
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(text, "_tokenise", killed)
        with pytest.raises(KilledError):
            open_text(folder)
    assert open_text(folder).num_tokens > 8000


def test_a_pickled_dataset_does_not_carry_its_tokens():
    dataset = open_text(PYTHON_STDLIB, "validation")
    first = dataset[0][0]
    copy = pickle.dumps(dataset)
    assert len(copy) < 2000
    assert torch.equal(pickle.loads(copy)[0][0], first)


def test_files_that_do_not_decode_are_skipped_and_counted(folder, caplog):
    (folder / "picture.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / ".hidden").write_text("not seen")
    with caplog.at_level(logging.WARNING):
        texts = documents(folder, "all")
    assert len(texts) == 201
    assert "skipped 1 of 201 files that are not UTF-8 text, first" in caplog.text
    assert "picture.jpg" in caplog.text


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.txt"])
def test_broken_lines_are_skipped_counted_and_named(tmp_path, caplog, name):
    good = b'{"text": "a line of text"}\n' * 300
    (tmp_path / name).write_bytes(good + b'\xff{"te\n' + good)
    with caplog.at_level(logging.WARNING):
        dataset = TextDataset(
            str(tmp_path / name), tokenizer=ByteTokenizer(), seq_len=8, part="all",
            max_bad_fraction=0.01,
        )  # fmt: skip
    assert dataset.num_tokens > 600 * 14
    assert "skipped 1 of 601" in caplog.text
    with pytest.raises(DataError, match=r"not UTF-8 text|1 of 601 samples cannot be read"):
        TextDataset(
            str(tmp_path / name), tokenizer=ByteTokenizer(), seq_len=8, part="all",
            max_bad_fraction=0.001,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"txt": "b", "n": 1}', r"a.jsonl:2: .*key \"text\".*: txt, n"),
        ("a.jsonl", '{"text": "a"}\n\n{"te', r"a.jsonl:3: not JSON: "),
        ("a.jsonl", '["text"]', r"a.jsonl:1: has no text under the key \"text\""),
        ("a.txt", "\udcff", r"a.txt: not UTF-8 text"),
        ("a.txt", "tiny", r"has 5 tokens, 9 are needed for 1 x 8 .* set training.dataset"),
    ],
)
def test_unusable_content_is_refused_by_place_and_remedy(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message) as refusal:
        open_text(tmp_path / name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("source", "suggestion"),
    [
        ("{}/shakespear.txt", "{}/shakespeare.txt"),
        ("{}/shakespeare", "{}/shakespeare.txt"),
        ("python_stdlb", "python_stdlib"),
    ],
)
def test_a_misspelt_source_is_refused_with_the_nearest(tmp_path, monkeypatch, source, suggestion):
    monkeypatch.setattr(sources, "_hub_answers", lambda _: False)
    (tmp_path / "shakespeare.txt").write_text("text")
    (tmp_path / "other.txt").write_text("text")
    with pytest.raises(DataError) as refusal:
        open_text(source.format(tmp_path))
    wanted = f'training.dataset = "{source.format(tmp_path)}": no such file or folder'
    assert str(refusal.value).startswith(wanted)
    assert str(refusal.value).endswith(f'; did you mean "{suggestion.format(tmp_path)}"?')


def test_a_shortage_of_held_out_text_names_the_validation_keys(tmp_path):
    (tmp_path / "text.txt").write_text("a short text")
    with pytest.raises(
        DataError,
        match=r"held out for validation\) has .* set validation.dataset .* validation.seq_len",
    ):
        open_text(tmp_path / "text.txt", "validation")


def test_an_unreachable_hub_is_refused_at_once_and_stays_configured(monkeypatch):
    monkeypatch.setattr(sources, "_hub_answers", lambda _: False)
    start = time.monotonic()
    with pytest.raises(DataError, match="cannot be loaded as a hub data set"):
        open_text("nobody/nothing")
    assert time.monotonic() - start < 60
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:en", ("owner/name", "en", "train")),
        ("owner/name-1.1:en.full", ("owner/name-1.1", "en.full", "train")),
        ("owner/name:en:test", ("owner/name", "en", "test")),
        ("owner/name::test", ("owner/name", None, "test")),
    ],
)
def test_a_hub_name_may_carry_config_and_split(monkeypatch, source, asked):
    def load(name, config, split):
        assert (name, config, split) == asked
        return datasets.Dataset.from_dict({"text": [f"row {number}" for number in range(50)]})

    monkeypatch.setattr(sources, "_hub_answers", lambda _: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(documents(source, "all")) == 51


def test_a_cache_folder_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(DataError, match="set the environment variable HF_DATASETS_CACHE"):
        open_text(folder)


def test_a_full_disk_is_named_and_its_space_given_back(folder, tmp_path, monkeypatch):
    def fill(file, *_):
        file.write(b"half of the tok")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(text, "_tokenise", fill)
    with pytest.raises(DataError, match=r"No space left on device; set the .* HF_DATASETS_CACHE"):
        open_text(folder)
    assert not list((tmp_path / "cache").rglob("*.unfinished"))


def test_parts_go_by_the_path_below_the_folder_that_was_named(folder):
    below = documents(folder, "validation")
    assert documents(folder.parent, "all") == documents(folder, "all")
    assert documents(folder.parent, "validation") != below


def test_a_last_line_that_is_most_of_the_text_is_cut(tmp_path):
    (tmp_path / "text.txt").write_text("short\n" + 200 * "x" + "\n")
    assert open_text(tmp_path / "text.txt", "validation", seq_len=1).num_tokens == 10 + 1


def test_bytes_decode_to_the_text_they_came_from():
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode("größer 🙂")
    assert tokenizer.decode(tokens) == "größer 🙂"
    assert max(tokens) < tokenizer.get_vocab_size()
