"""A model, its tokenizer and its learning rates fit together, or one line says what to change."""

from dataclasses import replace

import datasets
import pytest
import torch
from PIL import Image
from torch import nn

from parallel.recipes import recipe_of
from tests.support.titan_runs import image_run, text_run, write_text
from titan_shampoo.config import ConfigError
from titan_shampoo.titan.config import JobConfig, load_job_config
from titan_shampoo.titan.learning_rates import build_learning_rates
from titan_shampoo.titan.recipes import RESNETS, TRANSFORMERS, build_tokenizer


def job(flavor, folder=""):
    config = JobConfig()
    config.model = replace(config.model, flavor=flavor, hf_assets_path=str(folder))
    return config


def test_text_is_bytes_without_a_tokenizer_folder():
    tokenizer = build_tokenizer(job("byte_debug"))
    assert tokenizer.get_vocab_size() == TRANSFORMERS["byte_debug"].vocab_size


def test_a_model_made_for_a_tokenizer_does_not_read_bytes():
    with pytest.raises(ConfigError, match=r'"8B" has a vocabulary of 128256.*hf_assets_path'):
        build_tokenizer(job("8B"))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"hf_assets_path = .*no tokenizer can be read"):
        build_tokenizer(job("8B", tmp_path))


def test_a_broken_tokenizer_is_named_in_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="no tokenizer can be read") as raised:
        build_tokenizer(job("8B", tmp_path))
    assert "\n" not in str(raised.value)


def test_small_and_large_stems_exist_at_every_depth():
    assert {"resnet18", "resnet34", "resnet50", "resnet101", "resnet50_small"} <= RESNETS.keys()


@pytest.mark.parametrize(("num_steps", "said"), [(20, 1), (50, 0)])
def test_a_warmup_that_is_never_over_is_said_once_by_its_key(num_steps, said, caplog):
    parameter = nn.Parameter(torch.zeros(1))
    config = JobConfig().lr_scheduler
    config.warmup_steps = 50
    build_learning_rates([torch.optim.SGD([parameter], lr=1.0)], config, num_steps)
    ours = [record for record in caplog.records if record.name.startswith("titan_shampoo")]
    assert len(ours) == said
    assert all("warmup_steps = 50 is more than all 20 steps" in r.getMessage() for r in ours)


def num_samples(args):
    """How many samples a run has to train on."""
    job_config = load_job_config(args)
    recipe = recipe_of(job_config.model.name)
    tokenizer = recipe.build_tokenizer_fn and recipe.build_tokenizer_fn(job_config)
    loader = recipe.build_dataloader_fn(
        dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=job_config
    )
    return loader.num_samples


def test_text_is_held_out_only_without_other_text_to_validate_on(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_text(tmp_path)
    size = (tmp_path / "words.txt").stat().st_size
    part = num_samples(text_run(tmp_path, "run", training__seq_len=1))
    assert part == pytest.approx(0.95 * size, rel=0.01)
    other = {"validation__dataset": "python_stdlib", "training__seq_len": 1}
    assert num_samples(text_run(tmp_path, "run", **other)) >= size


def test_images_are_held_out_only_without_other_images_to_validate_on(tmp_path):
    for index in range(60):
        path = tmp_path / "photos" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    photos = {"training__dataset": tmp_path / "photos"}
    assert 45 < num_samples(image_run(tmp_path, "run", **photos)) < 60
    other = {"validation__dataset": tmp_path / "photos", **photos}
    assert num_samples(image_run(tmp_path, "run", **other)) == 60


def learning_rates(rates, *, num_steps=100):
    optimizers = [torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=rate) for rate in rates]
    config = replace(JobConfig().lr_scheduler, warmup_steps=10)
    return optimizers, build_learning_rates(optimizers, config, num_steps)


def rates_of(optimizers):
    return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]


def advance(optimizers, schedules, num_steps):
    for _ in range(num_steps):
        for optimizer in optimizers:
            optimizer.step()
        schedules.step()


def test_each_optimizer_resumes_with_its_own_learning_rate():
    optimizers, schedules = learning_rates([0.1, 0.001])
    advance(optimizers, schedules, 30)
    resumed_optimizers, resumed = learning_rates([0.1, 0.001])
    resumed.load_state_dict(schedules.state_dict())
    assert rates_of(resumed_optimizers) == rates_of(optimizers)
    advance(optimizers, schedules, 5)
    advance(resumed_optimizers, resumed, 5)
    assert rates_of(resumed_optimizers) == rates_of(optimizers)


def test_a_learning_rate_changed_in_the_toml_file_wins_on_resume():
    optimizers, schedules = learning_rates([0.1])
    advance(optimizers, schedules, 30)
    resumed_optimizers, resumed = learning_rates([0.2])
    resumed.load_state_dict(schedules.state_dict())
    assert rates_of(resumed_optimizers) == [2 * rate for rate in rates_of(optimizers)]
