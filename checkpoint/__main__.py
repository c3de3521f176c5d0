"""Inspect, verify, compare and convert checkpoints: ``python -m checkpoint --help``.

``inspect``, ``verify`` and ``diff`` need neither torch nor a GPU.
"""

import sys

from checkpoint.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
