"""Files on disk: their bytes in a folder, what is known of them in SQLite beside it, where batches are too.

One server at a time has the folder. Whatever a method has returned from is on disk: a server that was killed goes on
from there. Methods may be called from any thread; ``owner`` is the name of an API key, and sees what is its own.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from quire.errors import ConfigError
from quire_server.batch_settings import BatchSettings
from quire_server.errors import ApiError

SCHEMA = """
BEGIN;
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT, filename TEXT NOT NULL,
    purpose TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT, input_file_id TEXT NOT NULL,
    open INTEGER NOT NULL, object BLOB NOT NULL);
CREATE TABLE results (
    batch TEXT NOT NULL, line INTEGER NOT NULL, good INTEGER NOT NULL, output BLOB NOT NULL,
    PRIMARY KEY (batch, line));
PRAGMA user_version = 1;
COMMIT;
"""


class FileStore:
    """``used`` is how many bytes are kept, as far as they count: files, and answers that are to become files."""

    def __init__(self, folder: Path, settings: BatchSettings) -> None:
        """Raises ConfigError when the folder cannot be used, or another server uses it."""
        self.settings, self._lock = settings, threading.RLock()
        self._folder = folder / "files"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._db = sqlite3.connect(folder / "batches.sqlite", timeout=0, check_same_thread=False)
            self._open()
        except (OSError, sqlite3.Error) as error:
            said = str(error)
            reason = "another server uses it" if "locked" in said else said
            raise ConfigError(f"--data-dir {folder}: {reason}") from None
        self.used = self._count()

    def _open(self) -> None:
        db = self._db
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # until this process ends, however it ends
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, 1):
            raise OSError("it is of a newer version of this server")
        if version == 0:
            db.execute("PRAGMA auto_vacuum = FULL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("BEGIN IMMEDIATE")
        db.commit()
        if version == 0:
            db.executescript(SCHEMA)
        known = {id for (id,) in db.execute("SELECT id FROM files")}
        for path in self._folder.iterdir():
            if path.name not in known:  # of a write that did not come to its end
                path.unlink()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction; of an error nothing stays."""
        with self._lock, self._db:
            yield self._db

    def _count(self) -> int:
        sums = "SELECT (SELECT total(bytes) FROM files) + (SELECT total(length(output)) FROM results)"
        return int(self._db.execute(sums).fetchone()[0])

    @property
    def full(self) -> bool:
        return self.used >= self.settings.max_total_file_bytes

    def check_room(self, more: int = 0) -> None:
        """Raises 507 when no file, or none of so many bytes, can be added."""
        with self._lock:
            (files,) = self._db.execute("SELECT count(*) FROM files").fetchone()
        if files >= self.settings.max_files:
            limit = f"{self.settings.max_files} files (--max-files)"
        elif self.used + more > self.settings.max_total_file_bytes or self.full:
            limit = f"{self.settings.max_total_file_bytes} bytes of files (--max-total-file-bytes)"
        else:
            return
        raise ApiError(507, f"this server keeps at most {limit}: delete some first", code="storage_full")

    def add_file(
        self, source: BinaryIO, size: int, owner: str | None, filename: str, purpose: str, seconds: int | None
    ) -> dict[str, Any]:
        """Keep what is in ``source``; ``seconds``: for how long. ``filename`` is only shown, and never a path."""
        self._forget_expired()
        self.check_room(size)
        id = new_file()
        with self._new(id):
            with self.path(id).open("xb") as target:
                shutil.copyfileobj(source, target, 2**20)
                sync(target)
            with self._change() as db:
                self.check_room(size)  # others may have come meanwhile
                self._insert_file(db, id, owner, filename, purpose, seconds)
                self.used += size
        found = self.file(id, owner)
        assert found is not None
        return found

    @contextmanager
    def _new(self, *ids: str) -> Iterator[None]:
        """Of an error no file stays."""
        try:
            yield
        except BaseException:
            for id in ids:
                self.path(id).unlink(missing_ok=True)
            raise

    def _insert_file(
        self, db: sqlite3.Connection, id: str, owner: str | None, filename: str, purpose: str, seconds: int | None
    ) -> None:
        now = int(time.time())
        expires = None if seconds is None else now + seconds
        columns = "id, owner, filename, purpose, bytes, created_at, expires_at"
        values = (id, owner, filename, purpose, self.path(id).stat().st_size, now, expires)
        db.execute(f"INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def path(self, id: str) -> Path:
        """Where the bytes are of a file that is known by this id."""
        return self._folder / id

    def file(self, id: str, owner: str | None) -> dict[str, Any] | None:
        return next(iter(self._files("id = ? AND owner IS ?", (id, owner), "")), None)

    def files(
        self, owner: str | None, purpose: str | None, limit: int, after: str | None, order: str
    ) -> list[dict[str, Any]]:
        """At most ``limit``, newest first if order is "desc", from behind the file ``after``."""
        self._forget_expired()
        where, values = "owner IS ?", [owner]
        if purpose is not None:
            where, values = f"{where} AND purpose = ?", [*values, purpose]
        if after is not None:
            sign = "<" if order == "desc" else ">"
            where = f"{where} AND seq {sign} (SELECT seq FROM files WHERE id = ?)"
            values.append(after)
        return self._files(where, values, f"ORDER BY seq {'DESC' if order == 'desc' else 'ASC'} LIMIT {int(limit)}")

    def _files(self, where: str, values: Iterable[Any], rest: str) -> list[dict[str, Any]]:
        columns = ("id", "bytes", "created_at", "filename", "purpose", "expires_at")
        query = (
            f"SELECT {', '.join(columns)} FROM files WHERE {where} AND (expires_at IS NULL OR expires_at > ?) {rest}"
        )
        with self._lock:
            rows = self._db.execute(query, (*values, int(time.time()))).fetchall()
        kept = {"object": "file", "status": "processed", "status_details": None}
        return [{**dict(zip(columns, row, strict=True)), **kept} for row in rows]

    def delete_file(self, id: str) -> None:
        """Raises 409 when an unfinished batch reads it."""
        with self._change() as db:
            reader = db.execute("SELECT id FROM batches WHERE open AND input_file_id = ?", (id,)).fetchone()
            if reader is not None:
                raise ApiError(409, f"the file is the input of {reader[0]}, which has not ended", code="file_in_use")
            db.execute("DELETE FROM files WHERE id = ?", (id,))
        self._unlink([id])

    def _forget_expired(self) -> None:
        expired = (
            "SELECT id FROM files WHERE expires_at <= ? AND id NOT IN (SELECT input_file_id FROM batches WHERE open)"
        )
        with self._change() as db:
            ids = [id for (id,) in db.execute(expired, (int(time.time()),))]
            db.executemany("DELETE FROM files WHERE id = ?", [(id,) for id in ids])
        if ids:
            self._unlink(ids)

    def _unlink(self, ids: Iterable[str]) -> None:
        for id in ids:
            self.path(id).unlink(missing_ok=True)
        with self._lock:
            self.used = self._count()


def new_file() -> str:
    return f"file-{uuid.uuid4().hex}"


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    if os.name == "posix":  # the name, too
        folder = os.open(Path(file.name).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
