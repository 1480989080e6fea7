"""Who takes whom for a neighbour, whose GPU memory it may map."""

from pathlib import Path

import pytest

from gmanager.wire.messages import MemberAddress
from instance.host import host_of_this_process
from instance.rank_epoch import share_host


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("0b00\n")
    (tmp_path / "self/ns").mkdir(parents=True)
    for name in ("ipc", "pid"):
        (tmp_path / "self/ns" / name).symlink_to(f"{name}:[1]")
    return tmp_path


def test_processes_of_one_machine_are_of_one_host(proc: Path) -> None:
    gpus = ["GPU-a", "GPU-b"]
    here = host_of_this_process(gpus, proc)
    assert here == host_of_this_process(gpus, proc)
    assert host_of_this_process(gpus) == host_of_this_process(gpus), "this machine says all that it takes"


@pytest.mark.parametrize("other", ["machine", "IPC namespace", "PID namespace", "GPUs are seen", "order of GPUs"])
def test_another(other: str, proc: Path) -> None:
    gpus = ["GPU-a", "GPU-b"]
    before = host_of_this_process(gpus, proc)
    match other:
        case "machine":
            (proc / "sys/kernel/random/boot_id").write_text("0b01\n")
        case "IPC namespace" | "PID namespace":
            name = other[:3].lower()
            (proc / "self/ns" / name).unlink()
            (proc / "self/ns" / name).symlink_to(f"{name}:[2]")
        case "GPUs are seen":
            gpus = ["GPU-a"]
        case _:
            gpus.reverse()
    assert host_of_this_process(gpus, proc) != before


def test_who_can_not_say_is_a_host_of_its_own(proc: Path) -> None:
    (proc / "sys/kernel/random/boot_id").unlink()
    assert host_of_this_process([], proc) != host_of_this_process([], proc)


def test_rows_are_pushed_only_where_all_are_of_one_host() -> None:
    def members(*hosts: str) -> list[MemberAddress]:
        return [
            MemberAddress(rank=rank, id=rank, party_address="tcp://127.0.0.1:1", host=host) for rank, host in enumerate(hosts)
        ]

    assert share_host(members("a", "a", "a"))
    assert not share_host(members("a", "a", "b"))
