"""Whether a run can write where it is told to; asked before anything is built or written."""

import os
from pathlib import Path

from titan_shampoo.config.settings import Settings


def check_dump_folder(settings: Settings) -> None:
    """Refuse a ``job.dump_folder`` that cannot be made here; a dry run needs none.

    Raises:
        ConfigError: Naming what is in the way.
    """
    if settings["job.dry_run"]:
        return
    folder = Path(settings["job.dump_folder"]).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    config_file = settings["job.save_config_file"]
    if config_file and (folder / config_file).is_symlink():
        problem = f"{folder / config_file} is a link, and is not written through"
        raise settings.error("job.save_config_file", f"{problem}; remove it")
    if not there.is_dir():
        problem = f"{there} is a file"
    elif not os.access(there, os.W_OK | os.X_OK):
        problem = f"{there} cannot be written to"
    else:
        return
    raise settings.error("job.dump_folder", f"{problem}; set another folder")
