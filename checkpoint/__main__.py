"""Inspect, verify, compare and convert checkpoints: ``python -m checkpoint --help``.

``inspect``, ``verify`` and ``diff`` need neither torch nor a GPU.
"""

# ruff: noqa: E402  (a missing package is one line, not a traceback)
import sys

from titan_shampoo.extras import end_without

end_without("python -m checkpoint", "safetensors", "xxhash", "tqdm")

from checkpoint.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
