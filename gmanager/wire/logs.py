"""Logs of all processes: one event a line, with its fields.

An event's name is the same each time; what differs is in its fields. No field holds what a client wrote, but its request's id.
"""

import argparse
import logging
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

import structlog
from structlog.typing import EventDict, Processor

Style = Literal["console", "json"]
STYLES: tuple[Style, ...] = get_args(Style)
LEVELS = ("debug", "info", "warning", "error")

_FIRST = ["timestamp", "level", "program", "rank", "event", "request"]


def get_logger(name: str) -> Any:
    """A structlog logger: `log.info("what", field=value)`. Its events pass through the standard library's logger of that name.

    A field may not be called like an attribute of `logging.LogRecord`.
    """
    return structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What `configure` is to be told: `log_level` and `log_format`."""
    parser.add_argument("--log-level", default="info", choices=LEVELS)
    parser.add_argument("--log-format", default="console", choices=STYLES, help="key=value, or JSON")


def configure(level: str, style: Style, **about: object) -> None:
    """Write the events of this process, and those of the libraries in it, to standard error.

    level: one of LEVELS, the least that is written. about: fields of every line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(style, about))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def formatter(style: Style, about: Mapping[str, object]) -> logging.Formatter:
    """Makes lines of records: JSON, or `key=value` with quotes where they are needed."""

    def add_about(_logger: object, _method: str, event: EventDict) -> EventDict:
        return {**about, **event}

    render: list[Processor] = [structlog.processors.JSONRenderer()]
    if style == "console":
        render = [
            _escape_controls,
            structlog.processors.LogfmtRenderer(key_order=_FIRST, drop_missing=True, bool_as_flag=False),
        ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder(), structlog.stdlib.add_log_level, add_about],
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            *render,
        ],
    )


def _escape_controls(_logger: object, _method: str, event: EventDict) -> EventDict:
    """A request's id may hold anything: line ends, a terminal's commands, halves of surrogate pairs."""
    return {
        key: value if not isinstance(value, str) or value.isprintable() else "".join(map(_printable, value))
        for key, value in event.items()
    }


def _printable(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode()
