"""Settings of the methods for layers that contradict one another are refused by name."""

import pytest

from titan_shampoo.config import ConfigError, read_config

REFUSED = {
    "clip without clipping": (
        ["--optimizer.eva.scaling", "norm", "--optimizer.eva.kl_clip", "1e-3"],
        "optimizer.eva.kl_clip: is not read",
    ),
    "clip of Eva-s": (
        ["--optimizer.eva_s.kl_clip", "1e-3"],
        "optimizer.eva_s.kl_clip: is not read",
    ),
    "batch mean of nothing": (
        ["--optimizer.eva.kv_scale", "batch_mean"],
        "optimizer.eva.kv_scale: needs optimizer.eva.kv_batch_size",
    ),
    "batch of no mean": (
        ["--optimizer.eva.kv_batch_size", "96"],
        'optimizer.eva.kv_batch_size: needs optimizer.eva.kv_scale = "batch_mean"',
    ),
    "nesterov": (
        ["--optimizer.eva.momentum", "0", "--optimizer.eva.nesterov", "true"],
        "optimizer.eva.nesterov: needs optimizer.eva.momentum",
    ),
    "damping": (["--optimizer.kfac.damping", "0"], "optimizer.kfac.damping: got 0"),
    "order of refreshes": (
        ["--optimizer.kfac.refresh", "sometimes"],
        "optimizer.kfac.refresh",
    ),
    "failures": (["--optimizer.foof.max_failures", "0"], "optimizer.foof.max_failures: got 0"),
    "layers of none": (
        ["--optimizer.name", "Shampoo", "--metrics.layers", "true"],
        "metrics.layers: no method here looks into layers",
    ),
    "scale of K-FAC": (["--optimizer.kfac.scaling", "kl_norm"], "optimizer.kfac.scaling"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradiction_is_refused_by_name(case):
    arguments, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        read_config(["--optimizer.name", "Eva", *arguments])


@pytest.mark.parametrize("method", ["Eva", "EvaF", "FOOF", "KFAC"])
@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "zbvzerobubble", "DualPipeV"])
def test_schedules_that_leave_statistics_out_are_refused_by_name(method, schedule):
    pipeline = [
        *("--parallelism.pipeline_parallel_degree", "2"),
        *("--parallelism.pipeline_parallel_schedule", schedule),
    ]
    with pytest.raises(ConfigError, match=rf"pipeline_parallel_schedule: .* {method} measures"):
        read_config(["--optimizer.name", method, *pipeline])
    read_config(["--optimizer.name", "EvaS", *pipeline])


@pytest.mark.parametrize("method", ["Eva", "EvaF", "EvaS", "FOOF", "KFAC"])
def test_shared_averages_are_those_of_the_fallback(method):
    settings = read_config(["--optimizer.name", method, "--optimizer.beta1", "0.8"])
    assert settings["optimizer.beta1"] == 0.8
