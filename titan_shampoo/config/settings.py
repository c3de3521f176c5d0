"""What a person has set, where each value was set, and the defaults of everything else."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from titan_shampoo.config.errors import ConfigError
from titan_shampoo.config.schema import job_schema


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and the place where it was set: ``configs/x.toml:12``, or "command line"."""

    value: Any
    place: str


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings by dotted name, ``settings["training.steps"]``; checked, and free of torch.

    ``explicit`` holds what was set. A list of tables is one setting, ``optimizer.groups``, whose
    value is a list of dictionaries; beside it ``optimizer.groups[0].pattern`` and the like tell
    where each key stands.
    """

    explicit: Mapping[str, Setting]
    config_file: str | None
    notes: tuple[str, ...] = ()
    """What a person should know of how they came about, a line each."""

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401  (each setting has its own type)
        """The value that was set, or the default."""
        return self.explicit[name].value if name in self.explicit else _defaults()[name]

    def is_set(self, name: str) -> bool:
        """Whether the file or the command line sets this key."""
        return name in self.explicit

    def says(self, name: str) -> bool:
        """Whether this key is set, and not to nothing."""
        return name in self.explicit and self.explicit[name].value not in (None, [])

    def is_changed(self, name: str) -> bool:
        """Whether this key has another value than its default."""
        return name in self.explicit and self.explicit[name].value != _defaults()[name]

    def place(self, name: str) -> str:
        """Where the key was set; for a default, the file in which it could be set."""
        if name in self.explicit:
            return self.explicit[name].place
        return self.config_file or "command line"

    def error(self, name: str, problem: str) -> ConfigError:
        """The error that blames one key."""
        return ConfigError(f"{self.place(name)}: {name}: {problem}")


@cache
def _defaults() -> Mapping[str, Any]:
    return {name: key.default for name, key in job_schema().walk()} | {"optimizer.groups": []}
