"""What is read from the log of a process: literal logs in, one sentence out."""

import io
import logging

import pytest

from gmanager.cli.said import fields, is_echo, last_words, stage_of_instances, told_of_cells, why_instance_ended
from gmanager.cli.service import BLOCK_SIZE, DTYPES
from gmanager.wire import logs
from instance import config

ENDS = 'timestamp=1 level=error program=instance rank={rank} event="instance ends" reason="{reason}"'
FAILED = "E1127 19:41:38.2 7 torch/x.py:1002] failed (exitcode: {code}) local_rank: 0 (pid: 7843) of binary: /python"
GONE = ENDS.format(rank=1, reason="the gManager ended the cell: instance 0 of cell 'main' is lost")


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([ENDS.format(rank=0, reason="/m has no tokenizer"), FAILED.format(code=2)], "instance 3 ended: /m has no tokenizer"),
        (
            ["instance: --kv-tokens 8 is less than one block", FAILED.format(code=2)],
            "instance 3 ended: --kv-tokens 8 is less than one block",
        ),
        (["instance: error: unrecognized arguments: --x"], "instance 3 ended: unrecognized arguments: --x"),
        ([ENDS.format(rank=0, reason="the first"), GONE, FAILED.format(code=1)], "instance 3 ended: the first"),
        ([GONE, FAILED.format(code=-9)], "instance 3 was killed by SIGKILL"),
        ([GONE, FAILED.format(code=-15)], "instance 3 ended: the gManager ended the cell: instance 0 of cell 'main' is lost"),
        (
            [
                "ImportError: libx.so",
                "W1127 1 2 torch/x.py:1] Sending process 7 closing signal",
                FAILED.format(code=1),
                "later",
            ],
            "instance 3 ended with exit code 1: ImportError: libx.so",
        ),
        (["*****", "host: localhost"], None),
        ([], None),
    ],
)
def test_why_an_instance_ended(lines: list[str], sentence: str | None) -> None:
    assert why_instance_ended("instance 3", "\n".join(lines)) == sentence


def test_who_ends_because_of_another_is_an_echo() -> None:
    assert is_echo(why_instance_ended("instance 1", GONE) or "")
    assert not is_echo(why_instance_ended("instance 1", ENDS.format(rank=1, reason="no room")) or "")


LINE = "timestamp=1 level=info program=gmanager {}"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('event="instance comes" cell=main instance=2', "instance 2 of cell 'main' comes"),
        ('event="instance left" cell=main reason="instance 1 is lost: gone"', "instance 1 is lost: gone"),
        ('event="cell changes" cell=main epoch=1 reason="instance 1 could not step"', "instance 1 could not step"),
        ('event="instance refused" reason="its model is big"', "an instance was refused: its model is big"),
        ('event="cell ready" cell=main epoch=2 instances=2 kv_tokens=2048', "2 of 3 instances serve, 2,048 tokens of KV"),
        ('event="cell over" cell=main epoch=2 reason="none is left"', "cell 'main' is over: none is left"),
        ('event="request admitted" request="event=\\"cell over\\"" number=1', None),
        ("", None),
    ],
)
def test_what_is_told_of_cells(line: str, sentence: str | None) -> None:
    assert told_of_cells(LINE.format(line), 3) == sentence


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
    def log(*events: str) -> str:
        return "\n".join(f'level=info program=instance rank=0 event="{event}"' for event in events)

    assert stage_of_instances(["", ""]) == stage_of_instances(["*****\nevent=loading", log("loading")]) == "start"
    assert stage_of_instances([log("loading", "KV pool"), ""]) == "start", "the other has yet to begin: no stage comes twice"
    assert stage_of_instances([log("loading"), log("loading")]) == "load"
    assert stage_of_instances([log("loading"), log("loading", "converting")]) == "convert", "the other waits for it"
    assert stage_of_instances([log("loading", "KV pool"), log("loading")]) == "load"
    both = ["loading", "KV pool"]
    assert stage_of_instances([log(*both), log(*both)]) == "warm up"
    both.append("registered")
    assert stage_of_instances([log(*both), log(*both)]) == "form a cell"
    both.append("capturing CUDA graphs")
    assert stage_of_instances([log(*both), log(*both)]) == "capture CUDA graphs"
    both.append("epoch joined")
    assert stage_of_instances([log(*both), log(*both)]) == "form a cell"
