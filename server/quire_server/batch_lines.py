"""A batch's input: JSON lines, each a request with a ``custom_id``. All are checked before any is run."""

from __future__ import annotations

import uuid
from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from pydantic_core import from_json, to_json

from quire_server.limits import Limits, excess

MAX_CUSTOM_ID = 512
MAX_ERRORS = 100  # of one input that are told
FIELDS = frozenset({"custom_id", "method", "url", "body"})


class LineError(Exception):
    """What is wrong with a line, with OpenAI's names for it. ``line`` counts from 1; None: the input as a whole."""

    def __init__(self, line: int | None, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.line, self.code, self.message, self.param = line, code, message, param

    def as_dict(self) -> dict[str, Any]:
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}


@dataclass(frozen=True)
class Line:
    number: int
    custom_id: str
    url: str
    body: bytes  # JSON
    sequences: int  # that it makes of the engine
    streams: bool


def parse(raw: bytes, number: int, endpoints: Collection[str]) -> Line:
    """One line. Raises LineError."""
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise LineError(number, "invalid_json_line", f"this line is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise LineError(number, "invalid_json_line", "this line is not a JSON object")
    for name in ("custom_id", "method", "url", "body"):
        if name not in data:
            raise LineError(number, "missing_required_parameter", f"missing required parameter: {name}", name)
    unknown = next((name for name in data if name not in FIELDS), None)
    if unknown is not None:
        raise LineError(number, "unknown_parameter", f"{unknown[:64]!r}: unrecognized field of a line", unknown[:64])
    custom_id, url, body = data["custom_id"], data["url"], data["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        message = f"custom_id: must be a string of 1 to {MAX_CUSTOM_ID} characters"
        raise LineError(number, "invalid_custom_id", message, "custom_id")
    if data["method"] != "POST":
        raise LineError(number, "invalid_method", "method: must be POST", "method")
    if not isinstance(url, str) or url not in endpoints:
        allowed = " or ".join(sorted(endpoints))
        raise LineError(number, "invalid_url", f"url: must be {allowed}", "url")
    if not isinstance(body, dict):
        raise LineError(number, "invalid_type", "body: must be a JSON object", "body")
    return Line(number, custom_id, url, to_json(body), _sequences(body), bool(body.get("stream")))


def _sequences(body: dict[str, Any]) -> int:
    """Prompts times samples; what is no number here is refused by the route later."""
    prompt, n = body.get("prompt"), body.get("n")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return prompts * max(n if isinstance(n, int) else 1, 1)


class Input:
    """A file of lines. In memory is only where each begins."""

    def __init__(self, path: Path, endpoints: Collection[str], limits: Limits) -> None:
        self.path, self.endpoints, self.limits = path, endpoints, limits
        self.max_line_bytes = limits.max_body_bytes
        self._offsets, self._numbers = array("Q"), array("Q")

    def __len__(self) -> int:
        return len(self._offsets)

    def check(self, max_lines: int | None = None) -> list[LineError]:
        """Read all lines; what is wrong with them, at most the first MAX_ERRORS."""
        errors: list[LineError] = []
        seen: set[str] = set()
        with self.path.open("rb") as file:
            for number, offset, raw in self._raw(file):
                if max_lines is not None and len(self) >= max_lines:
                    message = f"the input has more requests than this server's limit of {max_lines} (--max-batch-lines)"
                    return [LineError(None, "too_many_requests", message)]
                try:
                    line = self._checked(number, raw)
                    if line.custom_id in seen:
                        message = f"custom_id: {line.custom_id!r} is that of another line too"
                        raise LineError(number, "duplicate_custom_id", message, "custom_id")
                    seen.add(line.custom_id)
                except LineError as error:
                    errors.append(error)
                    if len(errors) == MAX_ERRORS:
                        return errors
                self._offsets.append(offset)
                self._numbers.append(number)
        if not len(self):
            return [LineError(None, "empty_file", "the input has no requests")]
        return errors

    def _raw(self, file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
        """(number, offset, line) of each that is not blank; of a line that is too long only its beginning is read."""
        number, offset = 0, 0
        while raw := file.readline(self.max_line_bytes + 1):
            number += 1
            if raw.strip():
                yield number, offset, raw
            while not raw.endswith(b"\n") and (more := file.readline(self.max_line_bytes)):
                raw = more
            offset = file.tell()

    def _checked(self, number: int, raw: bytes) -> Line:
        if len(raw) > self.max_line_bytes:
            message = f"this line is longer than the limit of {self.max_line_bytes} bytes (--max-body-bytes)"
            raise LineError(number, "line_too_long", message)
        too_much = excess(raw, self.limits)
        if too_much:
            raise LineError(number, "too_many_values", f"this line has more {too_much}")
        return parse(raw, number, self.endpoints)

    def line(self, index: int) -> Line:
        """The index-th line that is not blank, from 0; it has been checked."""
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._checked(self._numbers[index], file.readline(self.max_line_bytes + 1))


def answered(custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """The line of the output for a request that was answered, also if it was refused."""
    one_line = msgspec.Raw((body or b"null").replace(b"\n", b" "))  # in JSON a line break can only be space
    return _output(custom_id, {"status_code": status, "request_id": request_id, "body": one_line}, None)


def unanswered(custom_ids: Iterable[str], code: str, message: str) -> Iterator[bytes]:
    """The lines of the error file for requests that never ran to their end."""
    for custom_id in custom_ids:
        yield _output(custom_id, None, {"code": code, "message": message})


def _output(custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    line = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(line) + b"\n"
