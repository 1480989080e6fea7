"""What torchrun says besides what instances say themselves: nothing."""

import subprocess
import sys

ASKED_WHILE_IT_ENDS = """
import atexit, os, signal, sys
from torch.distributed.elastic.multiprocessing.api import _terminate_process_handler
import instance.torchrun

instance.torchrun.torchrun = lambda: signal.signal(signal.SIGTERM, _terminate_process_handler)
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
sys.exit(instance.torchrun.main())
"""


def test_who_asks_it_to_end_while_it_ends_gets_no_traceback() -> None:
    ended = subprocess.run([sys.executable, "-c", ASKED_WHILE_IT_ENDS], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
