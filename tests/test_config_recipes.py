"""Settings of the recipes that contradict each other, or that nobody would read, are refused."""

import pytest

from titan_shampoo.config import ConfigError, read_config
from titan_shampoo.config.help import help_text

IMAGES = [
    "--model.name",
    "resnet",
    "--model.flavor",
    "resnet50",
    "--training.dataset",
    "owner/data",
]
DIGITS = ["--model.name", "resnet", "--training.dataset", "digits"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [*IMAGES, "--images.size", "288", "--images.resize", "256"],
            r"images.resize: got 256, .* \(288\)",
        ),
        ([*IMAGES, "--images.min_area", "0"], "images.min_area: .*greater than 0 and at most 1"),
        ([*IMAGES, "--images.mean", "0.5"], "images.mean: .*three numbers from 0 to 1"),
        ([*IMAGES, "--images.std", "1,1,0"], "images.std: .*three numbers greater than 0"),
        (
            [*IMAGES, "--images.mixup", "0.2", "--training.local_batch_size", "5"],
            "training.local_batch_size: got 5, images.mixup needs pairs",
        ),
        ([*DIGITS, "--images.flip", "0"], 'images.flip: not read with training.dataset = "digits"'),
        (["--images.size", "32"], 'images.size: not read by model.name = "llama3"'),
        (
            ["--training.epochs", "2", "--training.steps", "9"],
            "training.epochs: is instead of training.steps",
        ),
        (
            ["--lr_scheduler.milestones", "10,20", "--lr_scheduler.milestone_epochs", "1"],
            "lr_scheduler.milestone_epochs: is instead of lr_scheduler.milestones",
        ),
        (
            ["--lr_scheduler.milestones", "10", "--lr_scheduler.decay_type", "cosine"],
            "lr_scheduler.decay_type: is not read with milestones",
        ),
        (["--lr_scheduler.milestones", "20,10"], "lr_scheduler.milestones: .*each greater than"),
        (["--lr_scheduler.factor", "0.5"], "lr_scheduler.factor: needs lr_scheduler.milestones"),
        (["--optimizer.average_decay", "1"], "optimizer.average_decay: .*from 0 to below 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(args, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        read_config(args)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("form", ["--dry-run", "--dry_run", "--job.dry_run"])
def test_a_dry_run_has_a_short_name(form):
    assert read_config([form])["job.dry_run"] is True


def test_the_help_shows_the_dry_run():
    assert "--dry-run" in help_text()
