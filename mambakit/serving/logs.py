"""Logs of the server and its processes: lines for people, or a JSON object on each line."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

FORMS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
# An attribute of a record with a dictionary of fields, of which JSON makes members and text makes name=value.
FIELDS = "mambakit_fields"


@dataclass(frozen=True)
class LogOptions:
    """
    Attributes:
        form: "text" or "json".
        level: the least that is written.
        prompts: whether prompts and texts may stand in the log.
    """

    form: str = "text"
    level: str = "info"
    prompts: bool = False


def configure(options: LogOptions) -> None:
    """Write this process's log to standard error, in place of what was configured before."""
    handler = _StandardError()
    handler.setFormatter(_Json() if options.form == "json" else _Text())
    logging.basicConfig(level=options.level.upper(), handlers=[handler], force=True)
    for library in ("httpx", "httpcore", "huggingface_hub", "transformers", "uvicorn", "asyncio"):
        logging.getLogger(library).setLevel(logging.WARNING)


def fields(**values: Any) -> dict[str, Any]:
    """The ``extra`` of a logging call; fields that are None are left out."""
    return {FIELDS: {name: value for name, value in values.items() if value is not None}}


class _StandardError(logging.Handler):
    """Writes to what standard error is at that moment. Where it is closed, or its reader is gone, lines are dropped
    without a word: nobody reads what would be said about it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr
        if stream is None or stream.closed:
            return
        try:
            stream.write(self.format(record) + "\n")
            stream.flush()
        except OSError:  # no reader, or no room
            return
        except Exception:
            if not stream.closed:
                self.handleError(record)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)  # one line, whatever a request holds


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        # The message comes from us, the fields from requests: quoted where they are no plain words.
        line = super().format(record)
        values = getattr(record, FIELDS, None)
        if not values:
            return line
        return line + "".join(f" {name}={_plain(value)}" for name, value in values.items())


def _plain(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    simple = text.isascii() and text.isprintable() and text and not set(text) & set(' "=\\')
    return text if simple else json.dumps(text)
