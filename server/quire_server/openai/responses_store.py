"""Where responses are kept: one SQLite table, in memory or in a file, bounded in count and in bytes."""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from quire.errors import ConfigError

if TYPE_CHECKING:
    pass

T = TypeVar("T")
VERSION = 1
_encode, _decode = msgspec.json.encode, msgspec.json.decode
_TABLE = """
CREATE TABLE responses (
    place INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    owner TEXT,
    running INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    response BLOB NOT NULL,
    items BLOB NOT NULL,
    events BLOB
)
"""
_PUT = """
INSERT INTO responses (id, owner, running, bytes, response, items, events) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
    running = excluded.running, bytes = excluded.bytes, response = excluded.response, events = excluded.events
"""


@dataclass(frozen=True)
class StoreSettings:
    path: Path | None = None  # None: in memory
    max_count: int = 4096
    max_bytes: int = 256 * 2**20
    max_background: int = 64


@dataclass(frozen=True)
class Stored:
    """A response as it was stored, in JSON; ``items`` is the conversation that it answers."""

    response: bytes
    items: bytes
    events: list[bytes] | None  # of a stream that can be read again

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = _decode(self.response)
        return body

    def conversation(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = _decode(self.items)
        return items


class ResponseStore:
    """One thread does the work, so the event loop never waits for a disk. ``owner`` is who may see a response: None, and
    nobody with a name does. When there is no room the oldest goes; the newest always stays."""

    def __init__(self, settings: StoreSettings) -> None:
        """Raises ConfigError when the file is not ours, or is in use."""
        self.settings = settings
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="responses")
        self._db = _open(settings.path)
        self._count, self._bytes = self._db.execute("SELECT COUNT(*), TOTAL(bytes) FROM responses").fetchone()

    async def put(
        self,
        response: dict[str, Any],
        owner: str | None,
        items: list[dict[str, Any]],
        events: list[bytes] | None = None,
    ) -> None:
        """Store it, or store it again with what has changed."""
        encoded = _encode(response)  # here: the response may change while the thread works
        await self._run(lambda: self._put(response["id"], response["status"], encoded, owner, items, events))

    async def get(self, response_id: str, owner: str | None) -> Stored | None:
        query = "SELECT response, items, events FROM responses WHERE id = ? AND owner IS ?"
        row = await self._run(lambda: self._db.execute(query, (response_id, owner)).fetchone())
        if row is None:
            return None
        return Stored(row[0], row[1], msgspec.msgpack.decode(row[2]) if row[2] is not None else None)

    async def delete(self, response_id: str, owner: str | None) -> bool:
        """Whether there was one."""
        return await self._run(lambda: self._delete("id = ? AND owner IS ?", (response_id, owner)))

    def close(self) -> None:
        """After the last request."""
        self._pool.shutdown()
        self._db.close()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _put(
        self,
        response_id: str,
        status: str,
        response: bytes,
        owner: str | None,
        items: list[dict[str, Any]],
        events: list[bytes] | None,
    ) -> None:
        stream = msgspec.msgpack.encode(events) if events is not None else None
        conversation = _encode(items)
        size = len(response) + len(conversation) + len(stream or b"")
        row = (response_id, owner, status in ("queued", "in_progress"), size, response, conversation, stream)
        with self._db:
            before = self._db.execute("SELECT bytes FROM responses WHERE id = ?", (response_id,)).fetchone()
            self._db.execute(_PUT, row)
        self._count += before is None
        self._bytes += size - (before[0] if before is not None else 0)
        limits = self.settings
        while self._count > 1 and (self._count > limits.max_count or self._bytes > limits.max_bytes):
            self._delete("place = (SELECT MIN(place) FROM responses)", ())

    def _delete(self, where: str, values: tuple[Any, ...]) -> bool:
        with self._db:
            gone = self._db.execute(f"DELETE FROM responses WHERE {where} RETURNING bytes", values).fetchall()
        self._count -= len(gone)
        self._bytes -= sum(size for (size,) in gone)
        return bool(gone)


def _open(path: Path | None) -> sqlite3.Connection:
    """The table, made if it is not there. What was at work when its server ended has failed."""
    if path is not None:
        try:  # conversations are for this user alone
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise ConfigError(f"--response-store {path}: {error.strerror or error}") from None
    db = sqlite3.connect(path or ":memory:", check_same_thread=False, timeout=1.0)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # two servers would each count their own
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA secure_delete = ON")
        with db:
            db.execute("BEGIN EXCLUSIVE")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if version != (VERSION if tables else 0):
                raise ConfigError(f"--response-store {path}: it holds something else than responses of this version")
            if not tables:
                db.execute(_TABLE)
                db.execute(f"PRAGMA user_version = {VERSION}")
            _fail_interrupted(db)
    except sqlite3.Error as error:
        db.close()
        hint = ": another server uses it" if "locked" in str(error) else ""
        raise ConfigError(f"--response-store {path}: {error}{hint}") from None
    except ConfigError:
        db.close()
        raise
    return db


def _fail_interrupted(db: sqlite3.Connection) -> None:
    for place, text in db.execute("SELECT place, response FROM responses WHERE running").fetchall():
        response = _decode(text)
        response["status"] = "failed"
        response["error"] = {"code": "server_error", "message": "the server ended before the response did"}
        db.execute("UPDATE responses SET running = 0, response = ? WHERE place = ?", (_encode(response), place))


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("stored responses (/v1/responses)")
    default = StoreSettings()
    group.add_argument(
        "--response-store",
        type=Path,
        metavar="PATH",
        help="an SQLite file for them (default: in memory, until the end)",
    )
    group.add_argument(
        "--response-store-max", type=int, default=default.max_count, help="responses kept; the oldest go (%(default)s)"
    )
    group.add_argument(
        "--response-store-max-bytes", type=int, default=default.max_bytes, help="bytes that they may take (%(default)s)"
    )
    group.add_argument(
        "--max-background-responses", type=int, default=default.max_background,
        help="responses at work in the background at once (%(default)s)",
    )  # fmt: skip


def store_settings(args: argparse.Namespace) -> StoreSettings:
    """Raises ConfigError."""
    for name in ("response_store_max", "response_store_max_bytes", "max_background_responses"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    return StoreSettings(
        args.response_store, args.response_store_max, args.response_store_max_bytes, args.max_background_responses
    )
