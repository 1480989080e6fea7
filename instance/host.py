"""What a host is to instances that push rows into each other's GPU memory.

CUDA IPC opens memory of another process on the same machine, through a file in /dev/shm that torch counts the users in. Two
containers of one machine reach each other's only if they share these namespaces and see the same GPUs, in the same order.
Whoever may not is taken for another host: its rows travel by NCCL, which is slower, and finds a way itself. (NCCL compares
the boot id and the device of /dev/shm, too.)
"""

import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch


def host_of_this_process(gpus: Sequence[str], proc: Path = Path("/proc"), shm: Path = Path("/dev/shm")) -> str:
    """A digest that is the same in processes that can map each other's GPU memory. `gpus`: UUIDs of those that are seen.

    Where one of these facts can't be had, the process is a host of its own.
    """
    try:
        boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
        namespaces = [os.readlink(proc / "self/ns" / name) for name in ("ipc", "pid")]
        what = [boot, *namespaces, str(shm.stat().st_dev), *gpus]
    except OSError:
        what = [secrets.token_hex()]
    return hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that this process sees, in its order."""
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
