"""Check a configuration and start nothing: ``python -m titan_shampoo.config --job.config_file F``.

``WORLD_SIZE`` in the environment says for how many ranks, 1 by default. A mistake is one line and
exit code 2; torchrun would print a traceback of its own below it.
"""

import os
import sys

from titan_shampoo.config import ConfigError, check_world, read_config

if __name__ == "__main__":
    try:
        check_world(read_config(sys.argv[1:]), int(os.environ.get("WORLD_SIZE", "1")))
    except ConfigError as mistake:
        sys.stderr.write(f"{mistake}\n")
        sys.exit(2)
