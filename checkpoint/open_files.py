"""Safetensors files of one folder, kept open while tensors are read from them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open

from checkpoint.errors import in_one_line


class OpenFiles:
    """Opens each file at its first use, and closes all at the end of a ``with``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def file(self, name: str) -> Iterator[Any]:
        """A file to read from inside a ``with``.

        Raises:
            CheckpointError: If it cannot be opened or read; names the file.
        """
        path = self._folder / name
        try:
            if name not in self._opened:
                self._opened[name] = self._stack.enter_context(safe_open(path, framework="pt"))
            yield self._opened[name]
        except (SafetensorError, OSError) as error:
            raise in_one_line(path, "cannot be read", error) from error
