"""torchrun without its tracebacks: `python -m instance.torchrun --standalone --nproc-per-node 1 -m instance ...`.

An instance says itself why it ends; what torchrun adds to that names its own source. Exit codes: 0 when asked to end, 1 when an
instance failed.
"""

import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> int:
    # as torchrun itself sets for several processes: what the model may use is said by --threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        torchrun()
    except SignalException:
        return 0
    except ChildFailedError:
        return 1
    finally:  # it is over: who asks it to end now gets what it wants, and torchrun's handler would raise while Python ends
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
