"""A mistake in the configuration is one line that says where, what and what instead."""

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import PATIENCE
from titan_shampoo.config import (
    ConfigError,
    check_dump_folder,
    check_world,
    nearest,
    read_config,
    started_ranks,
    tables,
)
from titan_shampoo.config.help import help_text
from titan_shampoo.config.limits import LIMITS
from titan_shampoo.config.schema import job_schema
from titan_shampoo.config.unread import is_read
from titan_shampoo.config.values import choices

REPOSITORY = Path(__file__).parents[1]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.toml"))

# What the library offers to programs and a TOML file cannot or need not say.
LIBRARY_ONLY = {
    "model",
    "all_params",
    "pipeline_group",
    "params",
    "fallback",
    "process_group",
    "batch_dims",
}

GROUP = "[[optimizer.groups]]\n"
SHAMPOO = "[optimizer.shampoo]\n"

# TOML text, line of the mistake, key, what else the message must say.
WRONG_FILES = [
    ("[training\n", 1, "not valid TOML", ["end of a table declaration"]),
    ("[training]\nsteps = \n", 2, "not valid TOML", ["Invalid value"]),
    ("[training]\nsteps = 1\nsteps = 2\n", 3, "not valid TOML", ["overwrite"]),
    ("[trainning]\nsteps = 1\n", 1, "trainning", ["unknown table", '"training"']),
    ("steps = 1\n", 1, "steps", ["unknown table", '"training.steps" or "validation.steps"']),
    ("[training]\n\nstep = 1\n", 3, "training.step", ["unknown key", '"steps"']),
    ("[training]\nzzz = 1\n", 2, "training.zzz", ["unknown key", "valid here: ", "seq_len"]),
    ("[optimizer]\nblock_size = 64\n", 2, "optimizer.block_size", ["optimizer.shampoo.block_size"]),
    ("[optimizer.shampo]\nlr = 1.0\n", 1, "optimizer.shampo", ['"shampoo"']),
    (SHAMPOO + "blok_size = 64\n", 2, "optimizer.shampoo.blok_size", ['"block_size"']),
    ("optimizer = {shampoo = {blok = 64}}\n", 1, "optimizer.shampoo.blok", ["unknown key"]),
    ("training = 5\n", 1, "training", ["got 5", "a table, written [training]"]),
    ("[training.steps]\n", 1, "training.steps", ["got {}", "an integer"]),
    ('[training]\nsteps = "ten"\n', 2, "training.steps", ['got "ten"', "an integer"]),
    ("[training]\nsteps = true\n", 2, "training.steps", ["got true", "an integer"]),
    ("[training]\nsteps = 1.5\n", 2, "training.steps", ["got 1.5", "an integer"]),
    ("[training]\nsteps = 0\n", 2, "training.steps", ["got 0", "at least 1"]),
    ("[training]\nlocal_batch_size = -8\n", 2, "training.local_batch_size", ["at least 1"]),
    ("[training]\nglobal_batch_size = 0\n", 2, "training.global_batch_size", ["-1 or at least 1"]),
    ('[checkpoint]\nenable = "no"\n', 2, "checkpoint.enable", ['got "no"', "true or false"]),
    ("[checkpoint]\nenable = 1\n", 2, "checkpoint.enable", ["got 1", "true or false"]),
    ("[checkpoint]\ninterval = -5\n", 2, "checkpoint.interval", ["got -5", "at least 1"]),
    ("[checkpoint]\nkeep_latest_k = -1\n", 2, "checkpoint.keep_latest_k", ["0 or at least 1"]),
    ('[optimizer]\nname = "Shampo"\n', 2, "optimizer.name", ['"AdamW", "SGD"', '"Shampoo"?']),
    ("[optimizer]\nlr = true\n", 2, "optimizer.lr", ["got true", "a number"]),
    ("[optimizer]\nlr = 0.0\n", 2, "optimizer.lr", ["greater than 0"]),
    ("[optimizer]\nlr = nan\n", 2, "optimizer.lr", ["got NaN"]),
    ("[optimizer]\nbeta1 = 1.0\n", 2, "optimizer.beta1", ["from 0 to below 1"]),
    (SHAMPOO + "betas = 0.9\n", 2, "optimizer.shampoo.betas", ["got 0.9", "a list"]),
    (SHAMPOO + "betas = [0.9]\n", 2, "optimizer.shampoo.betas", ["two numbers"]),
    (SHAMPOO + "betas = [1.0, 0.9]\n", 2, "optimizer.shampoo.betas", ["the first from 0 to below"]),
    (SHAMPOO + "block_size = 0\n", 2, "optimizer.shampoo.block_size", ["at least 1"]),
    (SHAMPOO + "block_size = [8, 8, 8]\n", 2, "optimizer.shampoo.block_size", ["two such numbers"]),
    (SHAMPOO + 'grafting = "adma"\n', 2, "optimizer.shampoo.grafting", ['"rmsprop"', '"adam"?']),
    (
        SHAMPOO + "eps = 1e-12\neps_relative = 1e-6\n",
        3,
        "optimizer.shampoo.eps_relative",
        ["remove one"],
    ),
    (
        SHAMPOO + 'grafting = "none"\ngrafting_beta2 = 0.9\n',
        3,
        "optimizer.shampoo.grafting_beta2",
        ['grafting = "none"', "remove it"],
    ),
    (SHAMPOO + "nesterov = true\n", 2, "optimizer.shampoo.nesterov", ["momentum greater than 0"]),
    (
        "[optimizer.soap]\ndampening = 0.1\n",
        2,
        "optimizer.soap.dampening",
        ["optimizer.soap.momentum greater than 0"],
    ),
    (SHAMPOO + "beta3 = 1\n", 2, "optimizer.shampoo.beta3", ["from 0 to below 1"]),
    (SHAMPOO + "exponent = -0.5\n", 2, "optimizer.shampoo.exponent", ["0 or greater"]),
    (SHAMPOO + "exponent = []\n", 2, "optimizer.shampoo.exponent", ["one for each dim"]),
    (SHAMPOO + "exponent = [0.5, -1]\n", 2, "optimizer.shampoo.exponent", ["0 or greater"]),
    (
        SHAMPOO + 'exponent = [0.25, 0.3]\nroot_method = "newton"\n',
        2,
        "optimizer.shampoo.exponent",
        ["got 0.3", 'optimizer.shampoo.root_method = "eigh"'],
    ),
    (
        SHAMPOO + 'exponent = 0.2\nroot_method = "newton_schulz"\n',
        2,
        "optimizer.shampoo.exponent",
        ["got 0.2", "1/2, 1/4, 1/8"],
    ),
    (
        '[optimizer.soap]\nmerge = "paper"\nblock_size = [8, 4]\n',
        3,
        "optimizer.soap.block_size",
        ["got [8, 4]", "one number"],
    ),
    (
        "[optimizer.soap]\nbetas = [0.9, 1.0]\n",
        2,
        "optimizer.soap.betas",
        ["two numbers from 0 to below 1"],
    ),
    ("[optimizer.soap]\ngrafting_eps = 1.0\n", 2, "optimizer.soap.grafting_eps", ["unknown key"]),
    (
        "[optimizer.kl_shampoo]\nbetas = [0.9, 1.0]\n",
        2,
        "optimizer.kl_shampoo.betas",
        ["optimizer.kl_shampoo.grafting_beta2 = 0.99"],
    ),
    ("[optimizer.kl_shampoo]\nexponent = 0.5\n", 2, "optimizer.kl_shampoo.exponent", ["unknown"]),
    (SHAMPOO + "eps_relative = 2.0\n", 2, "optimizer.shampoo.eps_relative", ["at most 1"]),
    (
        SHAMPOO + "betas = [0.9, 1.0]\n",
        2,
        "optimizer.shampoo.betas",
        ['grafting = "adam"', "optimizer.shampoo.grafting_beta2 = 0.99"],
    ),
    (
        "[optimizer.sgd]\nmomentum = 0.9\ndampening = 0.1\nnesterov = true\n",
        4,
        "optimizer.sgd.nesterov",
        ["optimizer.sgd.dampening = 0"],
    ),
    (
        "[training.dataloader]\nprefetch_factor = 2\n",
        2,
        "training.dataloader.prefetch_factor",
        ["num_workers greater than 0"],
    ),
    ("[optimizer.sgd]\nnesterov = true\n", 2, "optimizer.sgd.nesterov", ["momentum"]),
    (
        "[optimizer]\nearly_step_in_backward = true\n",
        2,
        "optimizer.early_step_in_backward",
        ["remove it"],
    ),
    (
        '[optimizer]\nimplementation = "foreach"\n',
        2,
        "optimizer.implementation",
        ["not read by Shampoo"],
    ),
    (
        '[optimizer]\nname = "SGD"\nbeta1 = 0.9\n',
        3,
        "optimizer.beta1",
        ["not read by SGD", "optimizer.sgd.momentum"],
    ),
    (GROUP + 'optimizer = "AdamW"\n', 1, "optimizer.groups[0].pattern", ["is missing"]),
    (GROUP + "pattern = '('\n", 2, "optimizer.groups[0].pattern", ["not a regular expression"]),
    (
        f"{GROUP}pattern = 'a'\n{GROUP}pattern = 'b'\nlrr = 1.0\n",
        5,
        "optimizer.groups[1].lrr",
        ['"lr"'],
    ),
    (
        GROUP + "pattern = 'a'\noptimizer = 'AdamV'\n",
        3,
        "optimizer.groups[0].optimizer",
        ['"AdamW"?'],
    ),
    (GROUP + "pattern = 'a'\nlr = -1.0\n", 3, "optimizer.groups[0].lr", ["greater than 0"]),
    ("[optimizer]\ngroups = 3\n", 2, "optimizer.groups", ["[[optimizer.groups]]"]),
    ("[optimizer.groups]\npattern = 'a'\n", 1, "optimizer.groups", ["[[optimizer.groups]]"]),
    ('[training]\ndataset_path = "a"\n', 2, "training.dataset_path", ["set training.dataset"]),
    ('[model]\nhf_assets_path = "/no/such"\n', 2, "model.hf_assets_path", ["no such folder"]),
    (
        '[model]\nname = "resnet"\n[parallelism]\ntensor_parallel_degree = 2\n',
        4,
        "parallelism.tensor_parallel_degree",
        ["needs 1"],
    ),
    (
        '[model]\nname = "resnet"\n[training]\nseq_len = 64\n',
        4,
        "training.seq_len",
        ['not read by model.name = "resnet"'],
    ),
    (
        "[validation]\nenable = true\nseq_len = 64\n[training]\nseq_len = 32\n",
        3,
        "validation.seq_len",
        ["got 64", "at most training.seq_len (32)"],
    ),
    (
        '[checkpoint]\nexport_dtype = "bfloat16"\n',
        2,
        "checkpoint.export_dtype",
        ["needs checkpoint.last_save_model_only = true"],
    ),
    (
        "[checkpoint]\nlast_save_in_hf = true\n",
        2,
        "checkpoint.last_save_in_hf",
        ["needs checkpoint.last_save_model_only = true"],
    ),
    (
        "[checkpoint]\ninitial_load_in_hf = true\ninitial_load_model_only = false\n",
        2,
        "checkpoint.initial_load_in_hf",
        ["needs checkpoint.initial_load_model_only = true"],
    ),
    ('[job]\nconfig_file = "a"\n', 2, "job.config_file", ["on the command line only"]),
]

# Keys that torchtitan has and nobody reads here, each with a value that is not its default.
NOT_READ = [
    ("checkpoint.create_seed_checkpoint", "true"),
    ("checkpoint.enable_ft_dataloader_checkpoints", "false"),
    ("debug.moe_force_load_balance", "true"),
    ("experimental.custom_args_module", '"a"'),
    ("fault_tolerance.enable", "true"),
    ("fault_tolerance.replica_id", "1"),
    ("job.custom_config_module", '"a"'),
    ("job.print_config", "true"),
    ("memory_estimation.disable_fake_mode", "true"),
    ("model.print_after_conversion", "true"),
    ("model.tokenizer_path", '"a"'),
    ("optimizer.early_step_in_backward", "true"),
    ("parallelism.context_parallel_rotate_method", '"alltoall"'),
    ("parallelism.expert_parallel_comm_backend", '"deepep"'),
    ("training.dataloader.persistent_workers", "true"),
    ("training.dataset_path", '"a"'),
    ("validation.dataloader.persistent_workers", "true"),
    ("validation.dataloader.pin_memory", "true"),
    ("validation.dataloader.prefetch_factor", "2"),
    ("validation.dataset_path", '"a"'),
]

# Arguments, key, what else the message must say.
WRONG_ARGUMENTS = [
    (["--trainin.steps", "3"], "trainin", ["unknown table", '"training"']),
    (["--training.stepz", "3"], "training.stepz", ["unknown key", '"steps"']),
    (["--training.steps", "ten"], "training.steps", ['got "ten"', "an integer"]),
    (["--training.steps=0"], "training.steps", ["got 0", "at least 1"]),
    (["--training.steps"], "training.steps", ["value is missing"]),
    (["--training.steps", "--checkpoint.enable"], "training.steps", ["value is missing"]),
    (["--checkpoint.enable", "none"], "checkpoint.enable", ['got "none"', "true or false"]),
    (["--checkpoint.enable=maybe"], "checkpoint.enable", ['got "maybe"', "true or false"]),
    (["--checkpoint.no-enable=true"], "--checkpoint.no-enable", ["takes no value"]),
    (["--optimizer.name=adamw"], "optimizer.name", ['"AdamW"?']),
    (["--optimizer.shampoo", "64"], "optimizer.shampoo", ["is a table"]),
    (["--optimizer.groups", "x"], "optimizer.groups", ["set it in the TOML file"]),
    (["--optimizer.shampoo.block-size=64,x"], "optimizer.shampoo.block_size", ['"64,x"']),
    (["training.steps=3"], "training.steps=3", ["--table.key value"]),
    (["configs/run.toml"], "configs/run.toml", ["write --job.config_file configs/run.toml"]),
    (["--config", "run.toml"], "config", ["write --job.config_file"]),
    (["--config_file=run.toml"], "config_file", ["write --job.config_file"]),
    (
        ["--optimizer.name=EvaF", "--optimizer.shampoo.block_size=64"],
        "optimizer.shampoo.block_size",
        ["is not read by EvaF", 'optimizer.name = "Shampoo"'],
    ),
    (
        ["--model.name=resnet"],
        "training.dataset",
        ['"python_stdlib" is text', '"resnet" does not read', 'or "digits"'],
    ),
    (["--training.dataset=digits"], "training.dataset", ["is images", 'or "python_stdlib"']),
    (["--job.config_file", "/no/such.toml"], "job.config_file", ["no such file: /no/such.toml"]),
    (["--job.config_file", "/"], "job.config_file", ["cannot read /"]),
]

# Arguments, ranks, key that is blamed, what else the message must say.
WRONG_WORLDS = [
    ("data_parallel_shard_degree=4", 2, "data_parallel_shard_degree", ["= 2"]),
    ("data_parallel_replicate_degree=3", 2, "data_parallel_replicate_degree", ["= 2"]),
    ("tensor_parallel_degree=3", 4, "tensor_parallel_degree", ["there are 4 ranks"]),
    ("pipeline_parallel_degree=2", 1, "pipeline_parallel_degree", ["there is 1 rank", "= 1"]),
    ("expert_parallel_degree=3", 4, "expert_parallel_degree", ["a divisor of 4"]),
]


def refusal(args: list[str], world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        check_world(read_config(args), world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("text", "line", "key", "fragments"), WRONG_FILES)
def test_a_mistake_in_the_file_is_one_line_with_place_key_and_way_out(
    tmp_path, text, line, key, fragments
):
    file = tmp_path / "run.toml"
    file.write_text(text)
    message = refusal(["--job.config_file", str(file)])
    assert message.startswith(f"{file}:{line}: {key}: ")
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(("name", "value"), NOT_READ)
def test_a_key_that_nobody_reads_is_refused(tmp_path, name, value):
    table, _, key = name.rpartition(".")
    file = tmp_path / "run.toml"
    file.write_text(f"[{table}]\n{key} = {value}\n")
    assert refusal(["--job.config_file", str(file)]).startswith(f"{file}:2: {name}: no")


def test_a_key_that_nobody_reads_may_say_its_default(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        "[validation.dataloader]\npin_memory = false\n[fault_tolerance]\nenable = false\n"
    )
    assert read_config(["--job.config_file", str(file)])["fault_tolerance.enable"] is False


@pytest.mark.parametrize(
    ("argument", "key", "advice"),
    [
        ("--validation.local_batch_size=4", "local_batch_size", "training.local_batch_size (8)"),
        ("--validation.seq_len=64", "seq_len", "training.seq_len (2048)"),
    ],
)
def test_a_pipeline_validates_on_batches_of_the_shape_of_training(argument, key, advice):
    args = ["--validation.enable", "--parallelism.pipeline_parallel_degree=2", argument]
    message = refusal(args, 2)
    assert message.startswith(f"command line: validation.{key}: ")
    assert advice in message


def test_a_pipeline_validates_with_the_sequence_length_of_training_by_default():
    args = ["--validation.enable", "--parallelism.pipeline_parallel_degree=2"]
    check_world(read_config([*args, "--training.seq_len=64"]), 2)


@pytest.mark.parametrize(("args", "key", "fragments"), WRONG_ARGUMENTS)
def test_a_mistake_on_the_command_line_is_one_line_with_key_and_way_out(args, key, fragments):
    message = refusal(args)
    assert message.startswith(f"command line: {key}: ")
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(("argument", "world_size", "key", "fragments"), WRONG_WORLDS)
def test_degrees_that_do_not_fit_the_ranks_name_the_key_to_change(
    argument, world_size, key, fragments
):
    model = ["--model.name=llama4"] if key.startswith("expert") else []
    message = refusal([f"--parallelism.{argument}", *model], world_size)
    assert message.startswith(f"command line: parallelism.{key}: ")
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("method", ["Shampoo", "SOAP", "KLShampoo", "Eva", "KFAC"])
def test_offloading_to_the_host_is_refused_for_our_methods(method):
    offload = "--training.enable_cpu_offload=true"
    message = refusal([f"--optimizer.name={method}", offload])
    assert message == (
        f"command line: training.enable_cpu_offload: got true, but {method} cannot step "
        'parameters that are kept in host memory; set it to false, or optimizer.name = "AdamW"'
    )
    read_config(["--optimizer.name=AdamW", offload])


@pytest.mark.parametrize(
    ("model", "kind"),
    [("llama3", "expert"), ("llama4", "tensor"), ("llama4", "pipeline"), ("resnet", "context")],
)
def test_a_degree_that_a_model_has_no_plan_for_is_refused(model, kind):
    degree = f"parallelism.{kind}_parallel_degree"
    message = refusal([f"--model.name={model}", f"--{degree}=2"], 2)
    assert message == f'command line: {degree}: got 2, but model.name = "{model}" needs 1'


@pytest.mark.parametrize(
    ("args", "world_size", "key", "advice"),
    [
        (["--training.global_batch_size=20"], 2, "training.global_batch_size", "such as 16"),
        (
            ["--training.seq_len=254", "--parallelism.tensor_parallel_degree=2"],
            2,
            "training.seq_len",
            "such as 256",
        ),
        (
            [
                "--parallelism.pipeline_parallel_degree=2",
                "--parallelism.pipeline_parallel_microbatch_size=3",
            ],
            2,
            "parallelism.pipeline_parallel_microbatch_size",
            "a divisor of training.local_batch_size (8)",
        ),
    ],
)
def test_sizes_that_the_ranks_cannot_divide_come_with_one_that_they_can(
    args, world_size, key, advice
):
    message = refusal(args, world_size)
    assert message.startswith(f"command line: {key}: ")
    assert advice in message


@pytest.mark.parametrize(
    ("args", "world_size"),
    [
        ([], 1),
        ([], 3),
        (["--parallelism.data_parallel_replicate_degree=2"], 4),
        (["--parallelism.tensor_parallel_degree=2"], 2),
        (
            [
                "--parallelism.data_parallel_replicate_degree=2",
                "--parallelism.data_parallel_shard_degree=1",
            ],
            2,
        ),
        (["--training.global_batch_size=64"], 4),
    ],
)
def test_degrees_and_sizes_that_fit_pass(args, world_size):
    check_world(read_config(args), world_size)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_in_the_repository_is_valid_with_every_method(file):
    for method in choices(tables.Method):
        settings = read_config(["--job.config_file", str(file), "--optimizer.name", method])
        check_world(settings, 2)
        assert settings["optimizer.name"] == method


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["--training.steps", "7"], "training.steps", 7),
        (["--training.seq-len=64"], "training.seq_len", 64),
        (["--optimizer.shampoo.block-size", "64"], "optimizer.shampoo.block_size", 64),
        (["--optimizer.shampoo.block_size", "64,32"], "optimizer.shampoo.block_size", [64, 32]),
        (["--optimizer.shampoo.betas", "[0, 0.9]"], "optimizer.shampoo.betas", [0.0, 0.9]),
        (["--optimizer.shampoo.exponent", "1"], "optimizer.shampoo.exponent", 1.0),
        (["--optimizer.shampoo.exponent", "0.5,0"], "optimizer.shampoo.exponent", [0.5, 0.0]),
        (["--optimizer.shampoo.grafting", "none"], "optimizer.shampoo.grafting", "none"),
        (["--optimizer.name", "SOAP"], "optimizer.name", "SOAP"),
        (
            ["--optimizer.name=KLShampoo", "--optimizer.kl-shampoo.merge=none"],
            "optimizer.kl_shampoo.merge",
            "none",
        ),
        (["--optimizer.shampoo.eps", "none"], "optimizer.shampoo.eps", None),
        (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
        (["--checkpoint.enable"], "checkpoint.enable", True),
        (["--checkpoint.enable", "false"], "checkpoint.enable", False),
        (["--checkpoint.no_initial_load_model_only"], "checkpoint.initial_load_model_only", False),
        (["--optimizer.shampoo.compile"], "optimizer.shampoo.compile", True),
        (["--optimizer.shampoo.no-compile"], "optimizer.shampoo.compile", False),
        (
            ["--optimizer.name=KFAC", "--optimizer.kfac.no_factored-damping"],
            "optimizer.kfac.factored_damping",
            False,
        ),
        (["--optimizer.shampoo.compile", "none"], "optimizer.shampoo.compile", None),
        (["--optimizer.shampoo.compile=none"], "optimizer.shampoo.compile", None),
        (["--checkpoint.load-step", "-1"], "checkpoint.load_step", -1),
        (["--compile.components", "model"], "compile.components", ["model"]),
        (["--training.steps", "7", "--training.steps", "8"], "training.steps", 8),
    ],
)
def test_the_command_line_says_what_toml_can_say(args, key, value):
    settings = read_config(args)
    assert settings[key] == value
    assert type(settings[key]) is type(value)
    assert settings.place(key) == "command line"


def test_a_file_may_have_tables_of_methods_that_this_run_does_not_use(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[optimizer.soap]\nblock_size = 64\n[optimizer.eva_f]\ndamping = 0.1\n")
    settings = read_config(["--job.config_file", str(file), "--optimizer.name", "SOAP"])
    assert settings["optimizer.soap.block_size"] == 64


def test_a_group_may_use_a_method_that_the_command_line_sets_up(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[[optimizer.groups]]\npattern = 'attention'\noptimizer = 'SOAP'\n")
    args = ["--job.config_file", str(file), "--optimizer.soap.block_size", "64"]
    assert read_config(args)["optimizer.soap.block_size"] == 64


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"job\.dump_folder: .* cannot be written to: .*; set"):
        check_dump_folder(read_config(["--job.dump_folder", f"{tmp_path}/new/run"]))


def test_a_run_folder_below_a_file_is_refused_unless_nothing_is_written(tmp_path):
    (tmp_path / "file").write_text("")
    args = ["--job.dump_folder", f"{tmp_path}/file/run"]
    with pytest.raises(ConfigError, match=r"job\.dump_folder: .*/file is a file; set another"):
        check_dump_folder(read_config(args))
    check_dump_folder(read_config([*args, "--dry-run"]))
    check_dump_folder(read_config(["--job.dump_folder", f"{tmp_path}/new/run"]))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_line_beats_the_file_and_the_file_beats_the_default(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[training]\nsteps = 5\nseq_len = 64\n")
    settings = read_config(["--job.config_file", str(file), "--training.steps", "6"])
    assert settings["training.steps"] == 6
    assert (settings["training.seq_len"], settings.place("training.seq_len")) == (64, f"{file}:3")
    assert settings["training.local_batch_size"] == 8
    assert not settings.is_set("training.local_batch_size")


IN_EPOCHS = """\
[training]
epochs = 90
[lr_scheduler]
warmup_epochs = 5
milestone_epochs = [30, 60]
"""


@pytest.mark.parametrize(
    ("args", "left_out"),
    [
        (["--training.steps=10"], "training.epochs"),
        (["--training.steps=10", "--training.epochs=none"], "training.epochs"),
        (["--lr_scheduler.warmup_steps=0"], "lr_scheduler.warmup_epochs"),
        (["--lr_scheduler.milestones=3,6"], "lr_scheduler.milestone_epochs"),
    ],
)
def test_steps_on_the_command_line_beat_epochs_of_the_file(tmp_path, args, left_out):
    file = tmp_path / "run.toml"
    file.write_text(IN_EPOCHS)
    settings = read_config(["--job.config_file", str(file), *args])
    assert not settings[left_out]
    others = {"training.epochs", "lr_scheduler.warmup_epochs", "lr_scheduler.milestone_epochs"}
    assert all(settings[key] for key in others - {left_out})


def test_epochs_on_the_command_line_beat_steps_of_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[training]\nsteps = 100\n[lr_scheduler]\nwarmup_steps = 7\n")
    settings = read_config(["--job.config_file", str(file), "--training.epochs=2"])
    assert settings["training.epochs"] == 2
    assert not settings.is_set("training.steps")
    assert settings["lr_scheduler.warmup_steps"] == 7


def test_steps_and_epochs_in_one_place_are_refused(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[training]\nsteps = 100\nepochs = 2\n")
    problem = "training.epochs: is instead of training.steps; remove one of the two"
    assert refusal(["--job.config_file", str(file)]) == f"{file}:3: {problem}"
    both = ["--training.steps=9", "--training.epochs=2"]
    assert refusal(both) == f"command line: {problem}"


def test_what_the_method_of_the_command_line_does_not_read_is_left_out_of_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        '[optimizer]\nname = "Eva"\nlr = 0.5\nbeta1 = 0.8\nbeta2 = 0.95\n'
        f"[optimizer.eva]\ndamping = 0.1\n[metrics]\nlayers = true\n{GROUP}pattern = 'norm'\n"
    )
    args = ["--job.config_file", str(file), "--optimizer.name=SGD"]
    settings = read_config(args)
    names = ("optimizer.beta1", "optimizer.beta2", "metrics.layers")
    assert not any(settings.is_set(name) for name in names)
    assert settings.notes == (f"{file}: {', '.join(names)} are not read by SGD: left out",)
    assert (settings["optimizer.lr"], len(settings["optimizer.groups"])) == (0.5, 1)
    assert read_config(args[:2]).notes == ()


def test_what_the_command_line_says_itself_must_be_read(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[optimizer]\nname = "Eva"\nbeta1 = 0.8\n')
    args = ["--job.config_file", str(file), "--optimizer.name=SGD", "--optimizer.beta1=0.9"]
    assert refusal(args).startswith("command line: optimizer.beta1: is not read by SGD; remove it")


@pytest.mark.parametrize(("method", "exponent"), [("newton", 1 / 3), ("newton_schulz", 0.125)])
def test_an_exponent_that_the_root_method_can_find_passes(method, exponent):
    own = "--optimizer.shampoo."
    settings = read_config([f"{own}root_method={method}", f"{own}exponent={exponent},0"])
    assert settings["optimizer.shampoo.exponent"] == [exponent, 0.0]


@pytest.mark.parametrize("method", ["AdamW", "SGD"])
def test_what_torchs_methods_do_not_read_is_refused_in_a_group(tmp_path, method):
    file = tmp_path / "run.toml"
    file.write_text(f"{GROUP}pattern = 'norm'\noptimizer = '{method}'\nprecondition = true\n")
    assert refusal(["--job.config_file", str(file)]).startswith(
        f"{file}:4: optimizer.groups[0].precondition: is not read by {method}; remove it"
    )


def test_a_shared_key_may_be_read_by_a_group_alone(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[optimizer]\nname = "SGD"\nbeta1 = 0.8\n')
    file.write_text(file.read_text() + GROUP + "pattern = 'norm'\noptimizer = 'AdamW'\n")
    assert read_config(["--job.config_file", str(file)])["optimizer.beta1"] == 0.8


def test_the_line_of_a_key_is_found_behind_a_nested_array_that_looks_like_a_header(tmp_path):
    file = tmp_path / "run.toml"
    lines = ["[parallelism]", "module_fqns_per_model_part = [", '["output"]', "]", "zzz = 1"]
    file.write_text("\n".join(lines))
    assert refusal(["--job.config_file", str(file)]).startswith(f"{file}:5: parallelism.zzz: ")


def test_limits_are_on_keys_that_exist():
    groups = job_schema().tables["optimizer"].lists["groups"]
    known = dict(job_schema().walk()) | dict(groups.walk("optimizer.groups."))
    assert set(LIMITS) <= set(known)


def test_defaults_respect_their_own_limits():
    for name, key in job_schema().walk():
        if name in LIMITS and key.default is not None:
            assert LIMITS[name].holds(key.default), name


def test_nearest_ignores_case_and_is_silent_when_nothing_is_near():
    assert nearest("ADAMW", ["Shampoo", "AdamW"]) == '; did you mean "AdamW"?'
    assert nearest("xyz", ["Shampoo", "AdamW"]) == ""


def test_help_names_every_key_and_exits_cleanly(capsys):
    with pytest.raises(SystemExit) as caught:
        read_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, _ in job_schema().walk():
        assert (f"  {name.rpartition('.')[2]}: " in text) or not is_read(name)
    assert "[[optimizer.groups]]" in text


def test_help_leaves_out_what_is_refused():
    lines = help_text().splitlines()
    for refused in ("[fault_tolerance]", "[memory_estimation]", "  print_config: "):
        assert not any(line.startswith(refused) for line in lines), refused


def test_a_configuration_is_checked_without_importing_torch(tmp_path):
    program = (
        "import sys\n"
        "from titan_shampoo.config import ConfigError, check_world, read_config\n"
        "check_world(read_config(['--job.config_file', sys.argv[1]]), 2)\n"
        "try:\n"
        "    read_config(['--optimizer.shampoo.blok_size', '3'])\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
        "print([name for name in ('torch', 'torchtitan') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(REPOSITORY / "configs" / "transformer_debug.toml")],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    refused, imported = done.stdout.splitlines()
    assert '"block_size"' in refused
    assert imported == "[]"


def test_a_configuration_can_be_checked_for_a_number_of_ranks_without_a_run():
    done = subprocess.run(
        [sys.executable, "-m", "titan_shampoo.config", "--parallelism.tensor_parallel_degree=3"],
        cwd=REPOSITORY,
        env={**os.environ, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("command line: parallelism.tensor_parallel_degree: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_number_of_ranks_that_is_none_is_one_line():
    assert started_ranks({}) == 1
    with pytest.raises(ConfigError, match='WORLD_SIZE: got "two", expected a whole number'):
        started_ranks({"WORLD_SIZE": "two"})


def test_the_schema_read_from_source_is_the_dataclass_that_is_filled():
    from titan_shampoo.titan.config import make_job_config  # noqa: PLC0415 (imports torch)

    job_config = make_job_config(read_config([]))
    defaults = {name: key.default for name, key in job_schema().walk()} | {"optimizer.groups": []}
    assert _flat(job_config.to_dict(), defaults) == defaults


def test_settings_reach_the_job_config(tmp_path):
    from titan_shampoo.titan.config import load_job_config  # noqa: PLC0415 (imports torch)

    file = tmp_path / "run.toml"
    file.write_text(
        "[training]\nsteps = 5\n[training.dataloader]\nnum_workers = 2\n"
        "[optimizer]\nlr = 1\n[optimizer.shampoo]\nblock_size = [64, 32]\n"
        f"{GROUP}pattern = 'norm'\noptimizer = 'AdamW'\nlr = 2\n{GROUP}pattern = 'bias'\n"
    )
    job_config = load_job_config(["--job.config_file", str(file), "--training.steps", "6"])
    assert job_config.job.config_file == str(file)
    assert job_config.training.steps == 6
    assert job_config.training.dataloader.num_workers == 2
    assert job_config.optimizer.lr == 1.0
    assert job_config.optimizer.shampoo.block_size == [64, 32]
    first, second = job_config.optimizer.groups
    assert (first.pattern, first.optimizer, first.lr) == ("norm", "AdamW", 2.0)
    assert (second.pattern, second.optimizer, second.lr) == ("bias", None, None)
    assert job_config.validation.dataset == ""
    assert job_config.checkpoint.last_save_model_only is False


@pytest.mark.parametrize("method", ["Shampoo", "SOAP", "KLShampoo"])
def test_every_option_of_the_library_is_a_key_and_every_key_an_option(method):
    import titan_shampoo  # noqa: PLC0415 (imports torch)

    options = set(inspect.signature(getattr(titan_shampoo, method)).parameters) - LIBRARY_ONLY
    assert {field.name for field in dataclasses.fields(getattr(tables, method))} == options


@pytest.mark.parametrize("method", ["Shampoo", "SOAP", "KLShampoo"])
def test_every_choice_of_the_library_is_one_of_the_file(method):
    from titan_shampoo.options import CHOICES  # noqa: PLC0415 (imports torch)

    for field in dataclasses.fields(getattr(tables, method)):
        if field.name in CHOICES and not {True, False} & set(CHOICES[field.name]):
            offered = {str(choice).removeprefix("torch.") for choice in CHOICES[field.name]}
            # None is "none", or the key that is not set.
            assert {"none", *choices(field.type)} == {"none", *offered - {"None"}}, field.name


def _flat(values: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted names, down to the settings of the schema."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict) and prefix + name not in schema
        flat |= _flat(value, schema, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def test_a_missing_data_path_is_refused_with_the_nearest_before_torch_is_imported(tmp_path):
    (tmp_path / "words.txt").write_text("words")
    with pytest.raises(ConfigError) as caught:
        read_config(["--training.dataset", str(tmp_path / "word.txt")])
    message = str(caught.value)
    assert message.startswith("command line: training.dataset: ")
    assert f'did you mean "{tmp_path / "words.txt"}"?' in message
