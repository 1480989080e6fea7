"""torchrun without its tracebacks: `python -m instance.torchrun --standalone --nproc-per-node N -m instance ...`.

An instance says itself why it ends; what torchrun adds to that names its own source. Exit codes: 0 when asked to end, 1 when an
instance failed.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> int:
    try:
        torchrun()
    except SignalException:
        return 0
    except ChildFailedError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
