"""torchrun for people: a mistake that a rank has explained in one line ends with that line.

    python -m parallel.launch --standalone --nproc_per_node=2 train.py --job.config_file F

Takes torchrun's arguments. torchrun itself adds its own report and traceback to every exit of a
rank, and turns our exit code 2 into 1.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

EXPLAINED = 2
"""Exit code of a rank that has said what is wrong."""


def main(args: list[str]) -> None:
    """Run ``args`` as torchrun does.

    Raises:
        SystemExit: With code 2, if the first rank that failed has said why.
        ChildFailedError: torchrun's report of any other failure.
    """
    logging.getLogger(api.__name__).addFilter(_is_news)
    try:
        run(parse_args(args))
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode == EXPLAINED:
            raise SystemExit(EXPLAINED) from None
        raise


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun's says more than that a rank has ended, and the others with it."""
    message = record.getMessage()
    return f"exitcode: {EXPLAINED})" not in message and "closing signal" not in message


if __name__ == "__main__":
    main(sys.argv[1:])
