"""The agent's log: structured lines on stderr, for people or as JSON; systemd keeps them and bounds their size."""

import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

Event = MutableMapping[str, Any]
VALUE_MAX_CHARACTERS = 2000


def configure(form: str, level: str) -> None:
    """Set the log up for this process. `form` is `text` or `json`; `level` as Python names it (`info`, ...).

    What libraries log by Python's own `logging` goes the same way, from warnings up.
    """
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    shared: list[Callable[..., Any]] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _bounded,
    ]
    last: Callable[..., Any]
    if form == "json":
        shared.append(structlog.processors.format_exc_info)
        last = structlog.processors.JSONRenderer()
    else:
        last = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[*shared, last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=last, foreign_pre_chain=shared))
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)


def _bounded(logger: object, method: str, event: Event) -> Event:
    """Cut long values: what a stranger sends must not fill the disk."""
    for key, value in event.items():
        if isinstance(value, str) and len(value) > VALUE_MAX_CHARACTERS:
            event[key] = value[:VALUE_MAX_CHARACTERS] + "..."
    return event
