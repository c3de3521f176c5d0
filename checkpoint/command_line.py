"""The commands of ``python -m checkpoint`` and their output.

Exit codes: 0 for success, 1 if checkpoints differ or one is damaged, 2 if a command fails.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError
from checkpoint.folders import step_folder, steps_in
from checkpoint.manifest import MANIFEST, Manifest
from checkpoint.report import compared, described, lines_of_comparison, lines_of_description
from checkpoint.verify import file_problems, read_manifest
from titan_shampoo.config.errors import ConfigError

_DTYPES = ("float32", "float16", "bfloat16")

_INSPECT = "step, time, run, sizes by kind, block grids"
_VERIFY = "read every byte; exit code 1 if any has changed"

_ALL = "a checkpoint (outputs/checkpoint/step-30), or a folder or run with several: all of them"
_NEWEST = "a checkpoint (outputs/checkpoint/step-30), or a folder or run with several: the newest"


def main(args: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(args)
    try:
        return int(options.command(options))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint",
        description="Look at checkpoints, and turn them into other programs' formats and back.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, do: Callable[[Any], int], text: str, paths: str = _NEWEST
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=do)
        made.add_argument("path", type=Path, metavar="PATH", help=paths)
        return made

    inspect = command("inspect", _inspect, _INSPECT, _ALL)
    verify = command("verify", _verify, _VERIFY, _ALL)
    diff = command("diff", _diff, "differences between two checkpoints")
    diff.add_argument("other", type=Path, metavar="OTHER", help="the other checkpoint")
    for made in (inspect, verify, diff):
        made.add_argument("--json", action="store_true", help="one JSON object on standard output")
    export = command("export", _export, "write weights, or all state, for other programs")
    export.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    export.add_argument(
        "--to",
        choices=("hf", "dcp"),
        default="hf",
        help="hf: weights as safetensors under Hugging Face's names (of a ResNet: torchvision's); "
        "dcp: all tensors in torch.distributed.checkpoint's own format. Default: hf",
    )
    export.add_argument("--dtype", choices=_DTYPES, help="dtype of the weights; default: unchanged")
    convert = command(
        "convert",
        _convert,
        "make a checkpoint of weights in safetensors or torch.distributed.checkpoint's format, "
        "to begin a run from (checkpoint.initial_load_path)",
        "a folder of safetensors files, or of torch's own format",
    )
    convert.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    convert.add_argument(
        "--flavor", help="model.flavor of the Llama-style transformer; without it names stay"
    )
    return parser


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoint, or all checkpoints of a folder or of a run."""
    try:
        steps = steps_in(path)
        if not steps and not (path / MANIFEST).exists() and steps_in(path / "checkpoint"):
            return _checkpoints(path / "checkpoint")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return [step_folder(path, step) for step in steps] or [path]


def _one(path: Path) -> Path:
    """The checkpoint, or the newest one of a folder or of a run."""
    return _checkpoints(path)[-1]


def _inspect(options: argparse.Namespace) -> int:
    found = [described(folder, read_manifest(folder)) for folder in _checkpoints(options.path)]
    if options.json:
        _print(json.dumps(found, indent=1))
    for index, one in enumerate([] if options.json else found):
        _print("\n".join([""] * bool(index) + lines_of_description(one)))
    return 0


def _verify(options: argparse.Namespace) -> int:
    verdicts = {str(folder): _problems(folder) for folder in _checkpoints(options.path)}
    if options.json:
        _print(json.dumps(verdicts, indent=1))
    else:
        for name, problems in verdicts.items():
            _print("\n".join(problems) if problems else f"{name}: good")
    return int(any(verdicts.values()))


def _problems(folder: Path) -> list[str]:
    """All problems of a checkpoint."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    total = sum(file.bytes for file in manifest.files.values())
    with _bar(folder.name, total) as bar:
        return list(map(str, file_problems(folder, manifest, progress=bar.update)))


def _diff(options: argparse.Namespace) -> int:
    folders = [_one(options.path), _one(options.other)]
    first, second = (read_manifest(folder) for folder in folders)
    found = compared(folders[0], first, folders[1], second)
    maybe = found["tensors"].pop("content", [])
    if maybe:
        from checkpoint.values import value_differences  # noqa: PLC0415 (imports torch)

        with _bar("diff", 2 * sum(first.tensors[key].bytes for key in maybe)) as bar:
            found["values"] = value_differences(
                (folders[0], first), (folders[1], second), maybe, bar.update
            )
    if options.json:
        _print(json.dumps(found, indent=1))
    else:
        _print("\n".join(lines_of_comparison(found)))
    different = ("settings", "counters", "geometry", "tensors", "values")
    return int(any(found[key] for key in different))


def _export(options: argparse.Namespace) -> int:
    from checkpoint.interchange import export  # noqa: PLC0415 (imports torch)

    folder = _one(options.path)
    manifest = _good(folder)
    with _bar("export", _bytes_to_write(manifest, options.to)) as bar:
        export(
            folder, manifest, options.out, to=options.to, dtype=options.dtype, progress=bar.update
        )
    _print(f"{options.out}: step {manifest.step} of {folder}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from checkpoint.interchange import convert  # noqa: PLC0415 (imports torch)

    with _bar("convert") as bar:
        convert(options.path, options.out, flavor=options.flavor, progress=bar.update)
    _print(f"{options.out}: weights of {options.path}")
    return 0


def _good(folder: Path) -> Manifest:
    """The manifest of a checkpoint, after it is verified.

    Raises:
        CheckpointError: If it is damaged.
    """
    problems = _problems(folder)
    if problems:
        raise CheckpointError(problems[0])
    return read_manifest(folder)


def _bytes_to_write(manifest: Manifest, to: str) -> int:
    tensors = manifest.tensors.items()
    return sum(entry.bytes for key, entry in tensors if to == "dcp" or key.startswith("model."))


def _bar(what: str, total: int | None = None) -> Any:  # noqa: ANN401 (tqdm is untyped)
    from tqdm import tqdm  # noqa: PLC0415 (inspect and --help need no bar)

    return tqdm(
        desc=what,
        total=total,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )


def _print(text: str) -> None:
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # a reader like `head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
