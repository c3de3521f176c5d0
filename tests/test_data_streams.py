"""A stream gives the same samples on any number of ranks, and goes on where it was left."""

import json

import datasets
import pytest

from tests.support.ranks import run_on_ranks
from tests.support.titan_runs import records, text_run, train_all, trainer_of
from titan_shampoo.config import ConfigError, read_config
from titan_shampoo.data import DataError
from titan_shampoo.data.sources import is_held_out
from titan_shampoo.data.streams import StreamedWindows, StreamLoader, TextStream
from titan_shampoo.data.text import TextDataset
from titan_shampoo.data.tokenizer import ByteTokenizer

NUM_DOCUMENTS = 400
SEQ_LEN = 16


def documents():
    return [f"document {number} of the stream, " * (1 + number % 3) for number in range(400)]


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def folder(request, tmp_path_factory):
    """Six files of documents."""
    place = tmp_path_factory.mktemp(request.param)
    texts = documents()
    for number in range(6):
        rows = texts[number::6]
        if request.param == "jsonl":
            lines = [json.dumps({"text": text, "number": number}) for text in rows]
            (place / f"{number}.jsonl").write_text("\n".join(lines))
        else:
            datasets.Dataset.from_dict({"text": rows}).to_parquet(place / f"{number}.parquet")
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def stream(folder, num_shards=4):
    return TextStream(
        str(folder), tokenizer=ByteTokenizer(), seq_len=SEQ_LEN, num_shards=num_shards
    )


def loader(folder, rank, num_ranks, *, num_shards=4, batch=8):
    return StreamLoader(
        stream(folder, num_shards),
        local_batch_size=batch // num_ranks,
        dp_rank=rank,
        dp_world_size=num_ranks,
    )


def taken(loaders, num_batches):
    """The samples of all ranks in their order."""
    iterators = [iter(loader) for loader in loaders]
    return [
        row
        for _ in range(num_batches)
        for iterator in iterators
        for row in next(iterator)[0]["input"].tolist()
    ]


def ranks_of(folder, num_ranks, **options):
    return [loader(folder, rank, num_ranks, **options) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_shards", [4, 6, 16])
def test_any_number_of_ranks_reads_the_same_sequence(folder, num_shards):
    one = taken(ranks_of(folder, 1, num_shards=num_shards), 12)
    assert taken(ranks_of(folder, 2, num_shards=num_shards), 12) == one
    assert taken(ranks_of(folder, 8, num_shards=num_shards), 12) == one


@pytest.mark.parametrize("num_ranks_later", [1, 4])
def test_a_position_resumes_exactly_on_any_number_of_ranks(folder, num_ranks_later):
    whole = taken(ranks_of(folder, 1), 20)
    before = ranks_of(folder, 2)
    first = taken(before, 7)
    state = before[1].state_dict()
    assert state == before[0].state_dict() == {"samples": 7 * 8, "lanes": 4}
    after = ranks_of(folder, num_ranks_later)
    for loader_ in after:
        loader_.load_state_dict(state)
    assert first + taken(after, 13) == whole


@pytest.mark.parametrize("num_shards", [1, 3, 6, 16])
def test_a_pass_reads_every_document_once_and_none_that_is_held_out(folder, num_shards):
    stream_ = stream(folder, num_shards)
    seen = sorted(text for shard in range(num_shards) for text in stream_._texts(shard))
    assert seen == sorted(text for text in documents() if not is_held_out(text))


def test_with_other_text_to_validate_on_nothing_is_held_out(folder):
    whole = TextStream(
        str(folder), tokenizer=ByteTokenizer(), seq_len=SEQ_LEN, num_shards=4, hold_out=False
    )
    read = [text for shard in range(4) for text in whole._texts(shard)]
    assert sorted(read) == sorted(documents())


def test_what_is_held_out_is_validated_on(folder):
    windows = StreamedWindows(stream(folder).held_out(20), where="training.dataset")
    held_out = "\0".join(text for text in documents() if is_held_out(text))
    assert len(windows) == 20
    assert len(StreamedWindows(stream(folder).held_out(10**6), where="")) < 10**6
    for tokens, _ in map(windows.__getitem__, range(20)):
        assert all(part in held_out for part in bytes(tokens.tolist()).decode().split("\0"))


def test_a_rank_reads_only_the_shards_of_its_own_rows(folder, monkeypatch):
    opened: list[int] = []
    original = TextStream.windows

    def windows(self, shard):
        opened.append(shard)
        return original(self, shard)

    monkeypatch.setattr(TextStream, "windows", windows)
    taken([loader(folder, 1, 4, num_shards=16, batch=8)], 9)
    assert sorted(opened) == [2, 3, 10, 11]


def test_more_shards_than_documents_are_refused(folder):
    with pytest.raises(DataError, match=r"shard 10 of 4000 has no text .*training.stream_lanes"):
        taken([loader(folder, 0, 1, num_shards=4000, batch=4000)], 1)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"samples": 8, "lanes": 8}, "training.stream_lanes = 4: .* with 8; set it to that"),
        ({"samples": 8}, "with training.streaming = false"),
    ],
)
def test_a_position_in_another_sequence_is_refused(folder, state, message):
    with pytest.raises(DataError, match=message):
        loader(folder, 0, 1).load_state_dict(state)


def test_broken_rows_are_counted_and_too_many_refused(tmp_path):
    texts = [text for text in documents() if not is_held_out(text)]
    rows = [{"text": text} for text in texts]
    rows.insert(50, {"text": None})
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = str(tmp_path / "rows")
    counted = TextStream(
        source, tokenizer=ByteTokenizer(), seq_len=8, num_shards=1, max_bad_fraction=0.01
    )
    assert list(counted._texts(0)) == texts
    assert counted.skipped.count == 1
    strict = TextStream(source, tokenizer=ByteTokenizer(), seq_len=8, num_shards=1)
    with pytest.raises(
        DataError, match=r"training.max_bad_fraction = 0 allows, such as .*a.jsonl:51: "
    ):
        list(strict._texts(0))


def test_a_folder_without_a_data_set_is_refused_as_such(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "notes.xyz").write_text("nothing")
    with pytest.raises(DataError, match=r"rows\": no data set there .*it should hold parquet"):
        stream(tmp_path / "rows")


def test_a_folder_of_parquet_files_is_read_without_streaming_too(tmp_path):
    rows = datasets.Dataset.from_dict({"text": documents(), "n": list(range(NUM_DOCUMENTS))})
    rows.to_parquet(tmp_path / "a.parquet")
    text = TextDataset(str(tmp_path), tokenizer=ByteTokenizer(), seq_len=SEQ_LEN, part="all")
    assert text.num_tokens == sum(len(document) + 1 for document in documents())
    other = datasets.Dataset.from_dict({"body": ["a"] * 9})
    (tmp_path / "other").mkdir()
    other.to_parquet(tmp_path / "other" / "a.parquet")
    with pytest.raises(DataError, match='no text under the key "text"; its keys: body'):
        TextDataset(str(tmp_path / "other"), tokenizer=ByteTokenizer(), seq_len=SEQ_LEN, part="all")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--training.epochs=2"], "training.epochs: is not read with training.streaming"),
        (["--training.dataset=python_stdlib"], "training.streaming: training.dataset = "),
        (["--validation.enable"], "validation.steps: needs a number"),
        (["--training.dataloader.num_workers=2"], "num_workers: is not read with training.stream"),
        (["--training.no-streaming", "--training.stream_lanes=8"], "stream_lanes: needs training"),
        (["--model.name=resnet", "--model.flavor=resnet18"], 'streaming: needs model.name = "lla'),
    ],
)
def test_settings_that_need_an_index_are_refused_with_a_stream(args, message):
    base = ["--training.streaming", "--training.dataset=allenai/c4:en", "--validation.steps=-1"]
    with pytest.raises(ConfigError, match=message):
        read_config([*base, *args])


def stop_after(args, steps):
    with trainer_of(args) as trainer:
        trainer.job_config.training.steps = steps
        trainer.train()


@pytest.mark.slow
def test_a_streaming_run_resumes_on_another_number_of_ranks(folder, tmp_path):
    (tmp_path / "data").symlink_to(folder)
    common = {
        "training__dataset": folder,
        "training__streaming": True,
        "training__stream_lanes": 4,
        "training__global_batch_size": 8,
        "training__local_batch_size": 4,
        "training__steps": 4,
        "checkpoint__enable": True,
        "checkpoint__interval": 2,
        "validation__enable": True,
        "validation__freq": 2,
        "validation__steps": 2,
        "validation__local_batch_size": 2,
    }
    run_on_ranks(1, train_all, [text_run(tmp_path, "whole", **common)])
    run_on_ranks(2, stop_after, text_run(tmp_path, "parts", **common), 2)
    run_on_ranks(1, train_all, [text_run(tmp_path, "parts", **common)])
    whole, parts = (records(tmp_path, name, "loss") for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-5)
    assert set(records(tmp_path, "parts", "validation_loss")) >= {2, 4}
