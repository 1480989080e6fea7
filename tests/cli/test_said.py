"""What is read from the log of a process: literal logs in, one sentence out."""

import io
import logging

import pytest

from gmanager.cli.said import fields, last_words, stage_of_instances, why_instances_ended
from gmanager.cli.service import BLOCK_SIZE, DTYPES
from gmanager.wire import logs
from instance import config

ENDS = 'timestamp=1 level=error program=instance rank={rank} event="instance ends" reason="{reason}"'
FAILED = "E1127 19:41:38.2 7 torch/x.py:1002] failed (exitcode: {code}) local_rank: 0 (pid: 7843) of binary: /python"
GONE = ENDS.format(rank=1, reason="the gManager ended the cell: instance 0 of cell 'main' is lost")


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([ENDS.format(rank=0, reason="/m has no tokenizer"), FAILED.format(code=2)], "an instance ended: /m has no tokenizer"),
        (
            ["instance: --kv-tokens 8 is less than one block", FAILED.format(code=2)],
            "an instance ended: --kv-tokens 8 is less than one block",
        ),
        (["instance: error: unrecognized arguments: --x"], "an instance ended: unrecognized arguments: --x"),
        ([ENDS.format(rank=0, reason="the first"), GONE, FAILED.format(code=1)], "an instance ended: the first"),
        ([GONE, FAILED.format(code=-9)], "instance 0 was killed by SIGKILL"),
        ([GONE, FAILED.format(code=-15)], "an instance ended: the gManager ended the cell: instance 0 of cell 'main' is lost"),
        (
            [
                "ImportError: libx.so",
                "W1127 1 2 torch/x.py:1] Sending process 7 closing signal",
                FAILED.format(code=1),
                "later",
            ],
            "instance 0 ended with exit code 1: ImportError: libx.so",
        ),
        (["*****", "host: localhost"], None),
        ([], None),
    ],
)
def test_why_instances_ended(lines: list[str], sentence: str | None) -> None:
    assert why_instances_ended("\n".join(lines)) == sentence


def test_what_is_logged_is_read_again() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logs.formatter("console", {"program": "instance"}))
    logger = logging.getLogger("tests.said")
    logger.addHandler(handler)
    logger.error("instance ends", extra={"reason": 'say "a=b" or \\c:\n(1) this\n(2) that'})
    read = fields(out.getvalue())
    assert (read["event"], read["program"]) == ("instance ends", "instance")
    assert read["reason"] == 'say "a=b" or \\c: (1) this (2) that'


def test_last_words() -> None:
    assert last_words('a\nlevel=error event="it broke" reason="no room"\nb\n') == "it broke: no room"
    assert last_words("a\nb\n*****\n\n") == "b"
    assert last_words("") is None


def test_what_is_checked_before_is_what_instances_check() -> None:
    assert BLOCK_SIZE == {"cpu": config.CPU_BLOCK_SIZE, "cuda": config.GPU_BLOCK_SIZE}
    assert DTYPES == config.DTYPES


def test_the_stage_is_that_of_the_instance_that_is_furthest_behind() -> None:
    def log(*events: tuple[int, str]) -> str:
        return "\n".join(f'level=info program=instance rank={rank} event="{event}"' for rank, event in events)

    assert stage_of_instances("", 2) == stage_of_instances("*****\nevent=loading", 2) == "start"
    both: list[tuple[int, str]] = [(0, "loading"), (1, "loading")]
    assert stage_of_instances(log(both[0], (0, "KV pool")), 2) == "start", "the other has yet to begin: no stage comes twice"
    assert stage_of_instances(log(*both), 2) == "load"
    assert stage_of_instances(log(*both, (1, "converting")), 2) == "convert", "the other waits for it"
    assert stage_of_instances(log(*both, (0, "KV pool")), 2) == "load"
    both += [(0, "KV pool"), (1, "KV pool")]
    assert stage_of_instances(log(*both), 2) == "warm up"
    both += [(0, "registered"), (1, "registered")]
    assert stage_of_instances(log(*both), 2) == "form a cell"
    both += [(0, "capturing CUDA graphs"), (1, "capturing CUDA graphs")]
    assert stage_of_instances(log(*both), 2) == "capture CUDA graphs"
    assert stage_of_instances(log(*both, (0, "epoch joined"), (1, "epoch joined")), 2) == "form a cell"
