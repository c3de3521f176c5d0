"""What of a file gives way to the command line, beyond the keys that both of them set."""

from collections.abc import Mapping

from titan_shampoo.config.methods import methods_in_use, unread_by_methods
from titan_shampoo.config.settings import Setting, Settings

EITHER = (
    ("training.epochs", "training.steps"),
    ("lr_scheduler.warmup_epochs", "lr_scheduler.warmup_steps"),
    ("lr_scheduler.milestone_epochs", "lr_scheduler.milestones"),
)
"""Two ways of saying one thing, of which at most one may be used."""


def merged(
    in_file: Mapping[str, Setting], on_command_line: Mapping[str, Setting], file: str | None
) -> Settings:
    """The settings of both: the command line wins, also over what says the same in another way.

    If it names the method, the shared keys of the file that this method does not read are left out,
    and the settings have a note that names them: a file is written for one method, and there is no
    value that unsets such a key.

    Args:
        in_file: Settings of the file.
        on_command_line: Settings of the command line.
        file: The file's name.
    """
    rivals = {
        other
        for pair in EITHER
        for key, other in (pair, pair[::-1])
        if key in on_command_line and on_command_line[key].value not in (None, [])
    }
    kept = {name: setting for name, setting in in_file.items() if name not in rivals}
    settings = Settings({**kept, **on_command_line}, file)
    if "optimizer.name" not in on_command_line:
        return settings
    unread = [name for name, _ in unread_by_methods(settings) if name not in on_command_line]
    if not unread:
        return settings
    read = {name: one for name, one in settings.explicit.items() if name not in unread}
    verb = "is" if len(unread) == 1 else "are"
    methods = ", ".join(methods_in_use(settings))
    note = f"{file}: {', '.join(unread)} {verb} not read by {methods}: left out"
    return Settings(read, file, (note,))
