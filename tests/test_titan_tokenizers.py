"""Documents are told apart as by torchtitan's own loader, by every kind of tokenizer."""

import json
import logging

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from checkpoint.record import flattened
from titan_shampoo.config import ConfigError, read_config
from titan_shampoo.data.sources import is_held_out
from titan_shampoo.data.streams import TextStream
from titan_shampoo.data.text import TextDataset
from titan_shampoo.data.tokenizer import ByteTokenizer
from titan_shampoo.titan.config import JobConfig
from titan_shampoo.titan.recipes import build_tokenizer
from titan_shampoo.titan.tokenizer import DocumentTokenizer

# isort: split
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset

BOS, EOS, ONE, TWO = 1, 2, 3, 4
TEXTS = [f"one two {'one ' * (number % 3)} {number}" for number in range(200)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_tokenizer(folder, template=None, change=None, **config):
    """A tokenizer of words; ``config`` is its tokenizer_config.json, which it may lack."""
    folder.mkdir()
    words = {"[UNK]": 0, "<bos>": BOS, "<eos>": EOS, "one": ONE, "two": TWO}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    if change:
        change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


BOTH = {"bos_token": "<bos>", "eos_token": "<eos>"}
SAME = {"bos_token": "<eos>", "eos_token": "<eos>"}

# What tokenizer.json and tokenizer_config.json say, the tokens of "one", and those without marks.
KINDS = {
    "template with bos (Llama 3)": ({"template": "<bos> $A", **BOTH}, [1, 3, 2], [1, 3]),
    "template with eos (T5)": ({"template": "$A <eos>", **BOTH}, [1, 3, 2], [3, 2]),
    "template with both": ({"template": "<bos> $A <eos>", **BOTH}, [1, 3, 2], [1, 3, 2]),
    "no template (Qwen, GPT-NeoX)": (BOTH, [1, 3, 2], [3]),
    "add_bos_token, add_eos_token": (
        {"add_bos_token": True, "add_eos_token": True, **BOTH},
        [1, 3, 2],
        [1, 3, 2],
    ),
    "add_bos_token and a template (Llama 2)": (
        {"template": "<bos> $A", "add_bos_token": True, "add_eos_token": False, **BOTH},
        [1, 3, 2],
        [1, 3],
    ),
    "add_bos_token = false": (
        {"add_bos_token": False, "add_eos_token": False, **BOTH},
        [1, 3, 2],
        [3],
    ),
    "no bos (Qwen 2)": ({"bos_token": None, "eos_token": "<eos>"}, [3, 2], [3]),
    "no eos": ({"bos_token": "<bos>"}, [1, 3], [3]),
    "bos = eos (GPT-2, OLMo)": (SAME, [2, 3], [3]),
    "bos = eos, template with it": ({"template": "<eos> $A", **SAME}, [2, 3], [2, 3]),
    "bos = eos, template at the end": ({"template": "$A <eos>", **SAME}, [3, 2], [3, 2]),
    "bos = eos, add_eos_token": ({"add_eos_token": True, **SAME}, [2, 3], [3]),
    "tokens as tables": (
        {
            "bos_token": {"__type": "AddedToken", "content": "<bos>"},
            "eos_token": {"content": "<eos>"},
        },
        [1, 3, 2],
        [3],
    ),
    "a token that is not in the vocabulary": (
        {"bos_token": "<begin>", "eos_token": "<eos>"},
        [5, 3, 2],
        [3],
    ),
    "no tokenizer_config.json": ({}, [3], [3]),
    "no tokenizer_config.json, template": ({"template": "<bos> $A"}, [1, 3], [1, 3]),
}
kinds = pytest.mark.parametrize(("files", "marked", "plain"), KINDS.values(), ids=KINDS)


@kinds
def test_documents_are_marked_once_at_each_end(tmp_path, files, marked, plain):
    folder = write_tokenizer(tmp_path / "tokenizer", **files)
    tokenizer = DocumentTokenizer(folder)
    assert tokenizer.encode("one") == marked
    assert tokenizer.encode("one", add_bos=True, add_eos=True) == marked
    assert DocumentTokenizer(folder, separators=False).encode("one") == plain


@kinds
def test_the_marks_are_those_of_torchtitan(tmp_path, files, marked, plain):
    theirs = HuggingFaceTokenizer(write_tokenizer(tmp_path / "tokenizer", **files))
    assert theirs.encode("one", add_bos=True, add_eos=True) == marked
    assert theirs.encode("one") == plain


def write_texts(tmp_path):
    (tmp_path / "texts").mkdir()
    rows = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    (tmp_path / "texts" / "a.jsonl").write_text(rows)
    return tmp_path / "texts"


def tokens_of(dataset):
    """All tokens in order, but for the rest that fills no window."""
    tokens = dataset[0][0][:1].tolist()
    for index in range(len(dataset)):
        tokens += dataset[index][1].tolist()
    return tokens


@kinds
def test_the_tokens_are_those_of_torchtitans_data_set(tmp_path, monkeypatch, files, marked, plain):
    folder = write_tokenizer(tmp_path / "tokenizer", **files)
    texts = write_texts(tmp_path)
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    config = DatasetConfig(path="", loader=lambda _: rows, sample_processor=lambda r: r["text"])
    monkeypatch.setitem(DATASETS, "here", config)
    windows = HuggingFaceTextDataset("here", None, HuggingFaceTokenizer(folder), seq_len=1)
    theirs = [
        token
        for window, labels in windows
        for token in (*window["input"].tolist(), *labels.tolist())
    ]
    tokenizer = DocumentTokenizer(folder)
    ours = tokens_of(TextDataset(str(texts), tokenizer=tokenizer, seq_len=1, part="all"))
    assert ours[: len(theirs)] == theirs
    assert len(ours) - len(theirs) < 2
    stream = TextStream(str(texts), tokenizer=tokenizer, seq_len=1, num_shards=1, hold_out=False)
    windows = stream.windows(0)
    assert [next(windows).tolist()[0] for _ in ours] == ours


@pytest.mark.parametrize("separators", [True, False])
def test_validation_has_the_same_marks(tmp_path, separators):
    folder = write_tokenizer(tmp_path / "tokenizer", **BOTH)
    texts = write_texts(tmp_path)
    tokenizer = DocumentTokenizer(folder, separators=separators)
    wanted = [
        token
        for text in TEXTS
        if is_held_out(text)
        for token in HuggingFaceTokenizer(folder).encode(
            text, add_bos=separators, add_eos=separators
        )
    ]
    held_out = TextDataset(str(texts), tokenizer=tokenizer, seq_len=1, part="validation")
    assert tokens_of(held_out) == wanted
    stream = TextStream(str(texts), tokenizer=tokenizer, seq_len=1, num_shards=1)
    assert [window.tolist()[0] for window in stream.held_out(10**6)] == wanted[:-1]


@pytest.mark.parametrize("separators", [True, False])
def test_bytes_end_with_a_zero_unless_it_is_switched_off(tmp_path, separators):
    texts = write_texts(tmp_path)
    tokenizer = ByteTokenizer(separators)
    data = TextDataset(str(texts), tokenizer=tokenizer, seq_len=1, part="all")
    end = "\0" if separators else ""
    assert bytes(tokens_of(data)).decode() == "".join(text + end for text in TEXTS)


@pytest.mark.parametrize("tokenizer_of", ["bytes", "words"])
def test_each_form_has_its_own_cache(tmp_path, tokenizer_of):
    texts = write_texts(tmp_path)
    folder = write_tokenizer(tmp_path / "tokenizer", **BOTH)

    def open_text(separators):
        tokenizer = (
            ByteTokenizer(separators)
            if tokenizer_of == "bytes"
            else DocumentTokenizer(folder, separators=separators)
        )
        return TextDataset(str(texts), tokenizer=tokenizer, seq_len=1, part="all")

    lengths = [open_text(separators).num_tokens for separators in (True, False, True, False)]
    assert lengths[0] == lengths[2] > lengths[1] == lengths[3]
    assert len(list((tmp_path / "cache" / "titan_shampoo").glob("*.uint8"))) == 2


def test_tokens_of_torchtitans_bare_tokenizer_are_not_taken(tmp_path):
    # What this library cached before documents were marked.
    texts = write_texts(tmp_path)
    folder = write_tokenizer(tmp_path / "tokenizer", **BOTH)
    before = TextDataset(str(texts), tokenizer=HuggingFaceTokenizer(folder), seq_len=1, part="all")
    after = TextDataset(str(texts), tokenizer=DocumentTokenizer(folder), seq_len=1, part="all")
    assert after.num_tokens == before.num_tokens + 2 * len(TEXTS)


def job(folder, flavor="8B", **training):
    config = JobConfig()
    config.model.flavor = flavor
    config.model.hf_assets_path = str(folder)
    for key, value in training.items():
        setattr(config.training, key, value)
    return config


@pytest.mark.parametrize("separators", [True, False])
def test_the_setting_reaches_every_tokenizer(tmp_path, separators):
    folder = write_tokenizer(tmp_path / "tokenizer", **BOTH)
    words = build_tokenizer(job(folder, document_separators=separators))
    assert words.encode("one") == ([1, 3, 2] if separators else [3])
    letters = build_tokenizer(job("", "byte_debug", document_separators=separators))
    assert letters.encode("one") == [*b"one", *([0] if separators else [])]


def test_the_setting_is_on_and_among_those_that_a_resumed_run_compares():
    assert flattened(JobConfig())["training.document_separators"] is True


def test_a_network_that_sees_refuses_the_setting():
    with pytest.raises(
        ConfigError, match=r'document_separators: not read by model.name = "resnet"'
    ):
        read_config(["--model.name=resnet", "--model.flavor=resnet18", "--training.dataset=digits",
                     "--training.no-document_separators"])  # fmt: skip


@pytest.mark.parametrize(
    ("files", "separators", "said"),
    [
        ({}, True, 1),
        ({}, False, 0),
        ({"pad_token": "[UNK]"}, True, 1),
        ({"template": "<bos> $A"}, True, 0),
        ({"eos_token": "<eos>"}, True, 0),
    ],
)
def test_documents_that_run_into_each_other_are_said_once(
    tmp_path, caplog, files, separators, said
):
    folder = write_tokenizer(tmp_path / "tokenizer", **files)
    with caplog.at_level(logging.WARNING):
        build_tokenizer(job(folder, document_separators=separators))
    assert len(caplog.records) == said
    assert caplog.text.count("names neither bos_token nor eos_token, so documents run into") == said
    assert caplog.text.count("tokenizer_config.json there, too, or set training.document_") == said


@pytest.mark.parametrize("flavor", ["8B_flex", "8B_varlen"])
def test_attention_within_documents_needs_an_end(tmp_path, flavor):
    none = write_tokenizer(tmp_path / "none", bos_token="<bos>")
    with pytest.raises(ConfigError, match=f'"{flavor}" attends within documents.*no eos_token'):
        build_tokenizer(job(none, flavor))
    same = write_tokenizer(tmp_path / "same", **SAME)
    assert getattr(build_tokenizer(job(same, flavor)), "eos_id", None) == EOS


def test_texts_are_neither_cut_nor_padded(tmp_path):
    def change(tokenizer):
        tokenizer.enable_truncation(3)
        tokenizer.enable_padding(length=9, pad_id=EOS, pad_token="<eos>")

    folder = write_tokenizer(tmp_path / "tokenizer", change=change, **BOTH)
    assert DocumentTokenizer(folder).encode("one " * 5) == [1, 3, 3, 3, 3, 3, 2]
    assert DocumentTokenizer(folder, separators=False).encode("one " * 5) == [3] * 5


def test_a_vocabulary_with_gaps_is_as_large_as_its_last_id(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = {"[UNK]": 0, "one": 70_000}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer = DocumentTokenizer(str(folder))
    assert tokenizer.get_vocab_size() == 70_001
    text = TextDataset(str(write_texts(tmp_path)), tokenizer=tokenizer, seq_len=1, part="all")
    assert set(tokens_of(text)) == {70_000, 0}
    with pytest.raises(ConfigError, match="one of 70001; set another"):
        build_tokenizer(job(folder, "160M"))


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[1]",
        '{"bos_token": 5}',
        '{"bos_token": {"x": 1}}',
        '{"added_tokens_decoder": 1}',
        "\x00",
    ],
)
def test_a_broken_tokenizer_config_is_refused_in_one_line(tmp_path, config):
    folder = write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(config)
    with pytest.raises(ConfigError, match="no tokenizer can be read from it") as raised:
        build_tokenizer(job(folder))
    assert str(raised.value).isprintable()
