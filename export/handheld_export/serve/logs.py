"""Structured logs: one JSON object a line on standard error, without the text of prompts."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Writes a record's extra fields; of other libraries' records the message.

    Tracebacks are left out: their last line is the error's text, which may quote a prompt.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        tree: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "pid": os.getpid(),
        }
        extra = {k: v for k, v in vars(record).items() if k not in _STANDARD}
        if "event" not in extra:
            tree |= {"event": "message", "logger": record.name, "message": record.getMessage()}
            if record.exc_info and record.exc_info[0]:
                tree["error"] = record.exc_info[0].__name__
        else:
            tree |= extra
        return json.dumps(tree, default=str)


def config(level: str) -> dict[str, Any]:
    """Return the configuration of logging for a server.

    KServe logs errors with the text of the exception, so only its warnings' kinds get out.

    Parameters
    ----------
    level : str
        Of this package's own lines: debug, info, warning or error.
    """
    quiet = {"handlers": ["stderr"], "level": "WARNING", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": f"{__name__}.JsonFormatter"}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "stream": "ext://sys.stderr",
                "formatter": "json",
            },
            "none": {"class": "logging.NullHandler"},
        },
        "loggers": {
            "handheld.serve": {
                "handlers": ["stderr"],
                "level": level.upper(),
                "propagate": False,
            },
            "kserve": {"handlers": ["none"], "level": "CRITICAL", "propagate": False},
            "kserve.trace": {"handlers": ["none"], "level": "CRITICAL", "propagate": False},
            "uvicorn": quiet,
            "uvicorn.error": quiet,
            "uvicorn.access": {"handlers": [], "level": "CRITICAL", "propagate": False},
        },
        "root": {"handlers": ["stderr"], "level": "WARNING"},
    }
