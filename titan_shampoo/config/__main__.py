"""Check a configuration and start nothing: ``python -m titan_shampoo.config --job.config_file F``.

``WORLD_SIZE`` in the environment says for how many ranks, 1 by default. A mistake is one line and
exit code 2; torchrun would print a traceback of its own below it. ``--reference`` prints the page
of all settings instead.
"""

import os
import sys

from titan_shampoo.config import (
    ConfigError,
    check_dump_folder,
    check_world,
    read_config,
    started_ranks,
)
from titan_shampoo.config.reference import reference_page
from titan_shampoo.extras import end_without
from titan_shampoo.stopping import end_at_once

if __name__ == "__main__":
    end_at_once()
    end_without("python -m titan_shampoo.config", "tomli", "torchtitan")
    if sys.argv[1:] == ["--reference"]:
        sys.stdout.write(reference_page())
        sys.exit(0)
    try:
        settings = read_config(sys.argv[1:])
        check_world(settings, started_ranks(os.environ))
        check_dump_folder(settings)
    except ConfigError as mistake:
        sys.stderr.write(f"{mistake}\n")
        sys.exit(2)
