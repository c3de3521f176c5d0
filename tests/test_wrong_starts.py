"""Whatever a person can set wrong ends every rank with one line, exit code 2 and nothing written.

The real ``train.py`` is started on two ranks for each mistake. What is wrong with a setting alone
has its own, longer table in ``test_config.py``.
"""

import json
import re

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.support.ranks import run_on_ranks
from tests.support.titan_runs import text_run, train_all, write_text
from tests.support.train_script import start_on_ranks

TEXT = {
    "model.flavor": "byte_debug",
    "training.seq_len": "32",
    "training.local_batch_size": "4",
    "training.steps": "2",
    "optimizer.name": "AdamW",
}
IMAGES = {
    "model.name": "resnet",
    "model.flavor": "resnet18_small",
    "training.local_batch_size": "4",
    "training.steps": "2",
    "images.size": "8",
    "images.resize": "8",
    "activation_checkpoint.mode": "none",
    "optimizer.name": "SGD",
}
DIGITS = {key: value for key, value in IMAGES.items() if key != "images.resize"} | {
    "training.dataset": "digits"
}
VALIDATED = {"validation.enable": "true", "validation.local_batch_size": "2"}

# What is in the TOML file, what its message begins with after the file's name, what else it says.
FILES = [
    ("[training]\nstep = 1\n", ":2: training.step: unknown key", '"steps"'),
    ("[trainig]\nsteps = 1\n", ":1: trainig: unknown table", '"training"'),
    ("[training]\nsteps = 1\nsteps = 2\n", ":3: not valid TOML", "overwrite"),
    ("[training\nsteps = 1\n", ":1: not valid TOML", ""),
    ('[optimizer]\nlr = "1e-3"\n', ':2: optimizer.lr: got "1e-3", expected a number', ""),
    ("[optimizer.shampoo]\nbeta3 = 1.5\n", ":2: optimizer.shampoo.beta3: got 1.5", "below 1"),
    ("[lr_scheduler]\nmilestones = [9, 3]\n", ":2: lr_scheduler.milestones: got", "each greater"),
    ("[[optimizer.groups]]\npattern = '('\n", ":2: optimizer.groups[0].pattern: not a reg", ""),
]

# Name, settings ({} is the folder of the data below), what the message says.
MISTAKES = [
    ("no such file", {"job.config_file": "{}/none.toml"}, "job.config_file: no such file: {}/none"),
    ("optimizer", {**TEXT, "optimizer.name": "Shampo"}, 'optimizer.name: .*"Shampoo"\\?'),
    (
        "degree",
        {**TEXT, "parallelism.tensor_parallel_degree": "3"},
        "tensor_parallel_degree: .*set",
    ),
    (
        "context parallelism",
        {**TEXT, "parallelism.context_parallel_degree": "2"},
        "parallelism.context_parallel_degree: got 2, expected 1 on CPUs.*; set it to 1",
    ),
    (
        "shard degree",
        {**TEXT, "parallelism.data_parallel_shard_degree": "4"},
        "data_parallel_shard_degree = 2",
    ),
    (
        "sequence",
        {**TEXT, "parallelism.tensor_parallel_degree": "2", "training.seq_len": "33"},
        "training.seq_len: got 33, expected a multiple of 4",
    ),
    (
        "global batch",
        {**TEXT, "training.global_batch_size": "9"},
        "training.global_batch_size: got 9, .* such as 8",
    ),
    ("resnet under TP", {**DIGITS, "parallelism.tensor_parallel_degree": "2"}, "needs 1"),
    ("two lengths", {**DIGITS, "training.epochs": "1"}, "training.epochs: is instead of"),
    ("flavour", {**TEXT, "model.flavor": "byte_debg"}, 'no such flavour.*"byte_debug"\\?'),
    ("image flavour", {**DIGITS, "model.flavor": "resnet19"}, "model.flavor = .*only resnet18"),
    ("bytes for 8B", {**TEXT, "model.flavor": "8B"}, "set model.hf_assets_path to the folder"),
    (
        "no tokenizer",
        {**TEXT, "model.flavor": "27M", "model.hf_assets_path": "{}/empty"},
        "model.hf_assets_path = {}/empty: no tokenizer .*should hold tokenizer.json",
    ),
    (
        "broken tokenizer",
        {**TEXT, "model.flavor": "27M", "model.hf_assets_path": "{}/broken_tokenizer"},
        "model.hf_assets_path = .*no tokenizer can be read",
    ),
    (
        "wide tokenizer",
        {**TEXT, "model.hf_assets_path": "{}/tokenizer"},
        "vocabulary of 256, the tokenizer in model.hf_assets_path = .* one of 300; set",
    ),
    ("no text", {**TEXT, "training.dataset": "{}/words.tx"}, 'no such file.*"{}/words.txt"\\?'),
    ("empty text", {**TEXT, "training.dataset": "{}/empty.txt"}, "empty.txt.* has 0 tokens, .*set"),
    ("short text", {**TEXT, "training.dataset": "{}/short.txt"}, "has .* tokens, .* or lower"),
    (
        "short held-out part",
        {**TEXT, **VALIDATED, "training.dataset": "{}/one_line.txt"},
        "held out for validation.*set validation.dataset",
    ),
    ("no text key", {**TEXT, "training.dataset": "{}/keys.jsonl"}, 'under the key "text".*: body'),
    ("no JSON", {**TEXT, "training.dataset": "{}/broken.jsonl"}, "broken.jsonl.*not JSON"),
    ("no UTF-8", {**TEXT, "training.dataset": "{}/latin.txt"}, "latin.txt: not UTF-8 text"),
    ("empty folder", {**TEXT, "training.dataset": "{}/empty"}, "training.dataset = .*{}/empty"),
    (
        "only images for text",
        {**TEXT, "training.dataset": "{}/good/train/cat"},
        "not UTF-8 text, and no other",
    ),
    (
        "unreachable hub",
        {**TEXT, "training.dataset": "nobody/nothing"},
        'training.dataset = "nobody/nothing": no such file or folder, and cannot be loaded',
    ),
    ("no images", {**IMAGES, "training.dataset": "{}/goood"}, 'no such file.*"{}/good"\\?'),
    ("a file for images", {**IMAGES, "training.dataset": "{}/words.txt"}, "a folder is needed"),
    ("no classes", {**IMAGES, "training.dataset": "{}/empty"}, "no folder of images per class"),
    (
        "empty class",
        {**IMAGES, "training.dataset": "{}/empty_class"},
        'training.dataset = "{}/empty_class": class "dog" has no images.*put some there or remove',
    ),
    (
        "unreadable images",
        {**IMAGES, "training.dataset": "{}/broken"},
        r"37 samples in a row cannot be read, .*png: .*; repair or remove them",
    ),
    ("few images", {**IMAGES, "training.dataset": "{}/few"}, "has 2 images here, 8 are needed"),
    (
        "unknown class",
        {**IMAGES, **VALIDATED, "training.dataset": "{}/good", "validation.dataset": "{}/other"},
        'validation.dataset = "{}/other": class "bird" is not among',
    ),
    (
        "number of classes",
        {**IMAGES, "training.dataset": "{}/good", "images.num_classes": "3"},
        'images.num_classes = 3: training.dataset = "{}/good" has 2 classes; set it',
    ),
    (
        "no labels",
        {**IMAGES, "training.dataset": "{}/unlabelled"},
        "needs a column of images and one of class labels; has text",
    ),
    (
        "recomputed batch norm",
        {**DIGITS, "activation_checkpoint.mode": "full"},
        'activation_checkpoint.mode: got "full", expected "none"',
    ),
    (
        "odd mixup",
        {**DIGITS, "images.mixup": "0.2", "training.local_batch_size": "3"},
        "needs pairs",
    ),
    (
        "more stages than layers",
        {
            **TEXT,
            "parallelism.pipeline_parallel_degree": "2",
            "model.flavor": "byte_debug",
            "parallelism.pipeline_parallel_layers_per_stage": "1",
        },
        "parallelism.pipeline_parallel",
    ),
    (
        "unknown schedule",
        {
            **TEXT,
            "parallelism.pipeline_parallel_degree": "2",
            "parallelism.pipeline_parallel_schedule": "2F2B",
        },
        "parallelism.pipeline_parallel_schedule",
    ),
    ("unknown converter", {**TEXT, "model.converters": "float9"}, "model.converters"),
    (
        "no wandb",
        {**TEXT, "metrics.enable_wandb": "true"},
        "metrics.enable_wandb = true: the package wandb is not installed; pip install wandb",
    ),
    (
        "unknown recomputation",
        {**TEXT, "activation_checkpoint.mode": "some"},
        "activation_checkpoint.mode",
    ),
    (
        "unknown backend",
        {**TEXT, "compile.enable": "true", "compile.backend": "inductr"},
        "compile.backend",
    ),
    (
        "checkpoint of another model",
        {
            **TEXT,
            "checkpoint.enable": "true",
            "job.dump_folder": "{}/saved",
            "model.flavor": "27M",
            "model.hf_assets_path": "{}/tokenizer",
            "training.dataset": "{}/words.txt",
        },
        "saved/checkpoint",
    ),
    (
        "images after a checkpoint of text",
        {**DIGITS, "checkpoint.enable": "true", "job.dump_folder": "{}/saved"},
        "saved/checkpoint",
    ),
    (
        "checkpoint of another optimizer",
        {
            **TEXT,
            "checkpoint.enable": "true",
            "job.dump_folder": "{}/saved",
            "optimizer.name": "SOAP",
        },
        "saved/checkpoint",
    ),
    (
        "no such step",
        {
            **TEXT,
            "checkpoint.enable": "true",
            "job.dump_folder": "{}/saved",
            "checkpoint.load_step": "7",
        },
        "7",
    ),
    (
        "no checkpoint to begin from",
        {**TEXT, "checkpoint.enable": "true", "checkpoint.initial_load_path": "{}/empty"},
        "{}/empty",
    ),
    (
        "a file for a folder",
        {**TEXT, "checkpoint.enable": "true", "job.dump_folder": "{}/words.txt"},
        "job.dump_folder: {}/words.txt is a file; set another folder",
    ),
    ("text for images", {**IMAGES, "training.dataset": "python_stdlib"}, "folder of images, or"),
]


def write_images(folder, *, num=20, classes=("cat", "dog")):
    pixels = np.random.default_rng(0).integers(0, 255, (num, 8, 8, 3), dtype=np.uint8)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(num):
            Image.fromarray(pixels[number]).save(folder / name / f"{number}.png")


def write_tokenizer(folder, num_tokens):
    folder.mkdir()
    vocabulary = {chr(32 + token): token for token in range(num_tokens)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    (folder / "tokenizer_config.json").write_text("{}")


def write_texts(folder):
    write_text(folder)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("too short")
    (folder / "one_line.txt").write_text("one line " * 40)
    (folder / "keys.jsonl").write_text('{"body": "a"}\n' * 9)
    (folder / "broken.jsonl").write_text('{"text": "a\n' * 9)
    (folder / "latin.txt").write_bytes("größer".encode("latin-1") * 99)
    (folder / "empty").mkdir()
    write_tokenizer(folder / "tokenizer", 300)
    (folder / "broken_tokenizer").mkdir()
    (folder / "broken_tokenizer" / "tokenizer.json").write_text("{")


def write_image_folders(folder):
    for part in ("train", "val"):
        write_images(folder / "good" / part)
    write_images(folder / "other", classes=("bird", "cat"))
    write_images(folder / "few" / "train", num=1)
    write_images(folder / "empty_class" / "train", classes=("cat",))
    (folder / "empty_class" / "train" / "dog").mkdir()
    write_images(folder / "broken" / "train")
    for file in (folder / "broken").rglob("*.png"):
        file.write_bytes(file.read_bytes()[:20])
    rows = datasets.Dataset.from_dict({"text": ["a"] * 9})
    (folder / "unlabelled").mkdir()
    rows.to_parquet(folder / "unlabelled" / "train.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_texts(folder)
    write_image_folders(folder)
    saving = {"checkpoint__enable": True, "checkpoint__interval": 2}
    run_on_ranks(2, train_all, [text_run(folder, "saved", **saving)])
    return folder


LOCKS = (".lock", ".metrics.lock")
"""Files of a run that looks what is there."""


def listing(folder):
    """Folders, and files with their times; those of folders change where locks are taken."""
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.name not in LOCKS
    }


def assert_refused(settings, message, data, said_in):
    filled = {key: value.replace("{}", str(data)) for key, value in settings.items()}
    args = [f"--{key}={value}" for key, value in filled.items()]
    out = said_in / "out"
    if "job.dump_folder" not in settings:
        args.append(f"--job.dump_folder={out}")
    before = listing(data)
    ends = start_on_ranks(2, args, said_in)
    for rank, end in enumerate(ends):
        shown = "\n".join([*end.output[-9:], "---", *end.error[-9:]])
        assert end.exit_code == 2, f"rank {rank}: {end.exit_code}\n{shown}"
        assert len(end.error) == 1, f"rank {rank}:\n{shown}"
        assert re.search(message.replace("{}", re.escape(str(data))), end.error[0]), end.error[0]
    assert listing(data) == before
    assert not [path for path in out.rglob("*") if path.name not in ("checkpoint", *LOCKS)]


@pytest.mark.parametrize(("text", "place", "remedy"), FILES, ids=[place for _, place, _ in FILES])
def test_a_wrong_file_ends_all_ranks_at_its_line(tmp_path, text, place, remedy):
    file = tmp_path / "run.toml"
    file.write_text(text)
    for end in start_on_ranks(2, ["--job.config_file", str(file)], tmp_path):
        assert end.exit_code == 2
        (line,) = end.error
        assert line.startswith(f"{file}{place}")
        assert remedy in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [mistake[1:] for mistake in MISTAKES],
    ids=[mistake[0].replace(" ", "-") for mistake in MISTAKES],
)
def test_a_mistake_ends_all_ranks_in_one_line_and_writes_nothing(data, tmp_path, settings, message):
    assert_refused(settings, message, data, tmp_path)
