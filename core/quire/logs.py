"""How the log looks: lines for people, or one JSON object per line for programs. The standard library's logging does it."""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any, Literal, get_args

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[str, ...] = get_args(LogFormat)
FIELDS = (
    "request_id", "model", "key_name", "user", "method", "path", "status", "duration_ms", "ttft_ms", "prompt_tokens",
    "completion_tokens", "cached_tokens", "finish_reasons", "metadata",
)  # fmt: skip
"""What a line's ``extra`` may add to a JSON object; a text line has what its message says."""


class JsonFormatter(logging.Formatter):
    """One object per line: time (UTC), level, logger, process, message, those of FIELDS that the line brought, and the
    traceback as ``exception``."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": self.process,
            "message": record.getMessage(),
        }
        line.update({name: value for name in FIELDS if (value := getattr(record, name, None)) is not None})
        if record.exc_info:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=True, default=str)


def set_up(format: LogFormat, process: Literal["server", "engine"], level: int | str = logging.INFO) -> None:
    """Send this process' log to standard error. Called once, by a process that is ours."""
    handler = logging.StreamHandler()
    if format == "json":
        handler.setFormatter(JsonFormatter(process))
        logging.captureWarnings(True)
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
