"""Log lines, as a program reads them: one event each, whatever a request's id holds."""

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.wire import logs

PAIR = r"""(\w+)=("(?:[^"\\]|\\.)*"|[^ \n]*)"""

log = logs.get_logger("tests.logs")


@pytest.fixture(scope="module", params=logs.STYLES)
def style(request: pytest.FixtureRequest) -> logs.Style:
    style: logs.Style = request.param
    return style


@pytest.fixture(scope="module")
def out(style: logs.Style) -> Iterator[io.StringIO]:
    logger, out = logging.getLogger("tests.logs"), io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logs.formatter(style, {"program": "tests", "rank": 3}))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield out
    logger.removeHandler(handler)


def written(out: io.StringIO) -> str:
    """The one line since the last call."""
    text = out.getvalue()
    out.seek(0)
    out.truncate()
    assert text.endswith("\n") and len(text.splitlines()) == 1, text
    return text


def fields(line: str, style: logs.Style) -> dict[str, str]:
    if style == "json":
        return {key: str(value) for key, value in json.loads(line).items()}
    assert re.fullmatch(rf"{PAIR}(?: {PAIR})*\n", line), line
    return {key: re.sub(r"\\(.)", r"\1", text[1:-1]) if text[:1] == '"' else text for key, text in re.findall(PAIR, line)}


def test_an_event_and_its_fields(out: io.StringIO, style: logs.Style) -> None:
    log.info("request finished", request="cmpl-1", generated_tokens=7, error='it\'s "full" = 5')
    line = written(out)
    assert fields(line, style) == {
        "timestamp": fields(line, style)["timestamp"],
        "level": "info",
        "program": "tests",
        "rank": "3",
        "event": "request finished",
        "request": "cmpl-1",
        "generated_tokens": "7",
        "error": 'it\'s "full" = 5',
    }


def test_what_is_below_the_level_is_left_out(out: io.StringIO) -> None:
    log.debug("nothing")
    log.info("something")
    assert "something" in written(out)


def test_what_libraries_say(out: io.StringIO, style: logs.Style) -> None:
    logging.getLogger("tests.logs.library").warning("lost %d of %s", 3, "all")
    found = fields(written(out), style)
    assert (found["level"], found["event"], found["rank"]) == ("warning", "lost 3 of all", "3")


def test_a_traceback_is_part_of_its_line(out: io.StringIO, style: logs.Style) -> None:
    try:
        raise OverflowError("too far")
    except OverflowError:
        log.exception("failed", request="r")
    found = fields(written(out), style)
    assert (found["level"], found["request"]) == ("error", "r")
    assert "test_logs.py" in found["exception"] and "OverflowError: too far" in found["exception"]


@given(request_id=st.text(st.characters(exclude_categories=[])))
def test_any_id_stays_in_its_field(out: io.StringIO, style: logs.Style, request_id: str) -> None:
    log.info("request refused", request=request_id, reason="invalid")
    line = written(out)
    assert line[:-1].isprintable()
    found = fields(line, style)
    assert (found["event"], found["reason"]) == ("request refused", "invalid")
    if style == "json" or request_id.isprintable():
        assert found["request"] == request_id
