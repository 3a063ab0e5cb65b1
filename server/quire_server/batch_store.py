"""Files and batches on disk: their bytes in a folder, what is known of them in SQLite beside it.

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
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from quire.errors import ConfigError
from quire_server.batch_settings import BatchSettings
from quire_server.errors import ApiError

SCHEMA = """
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
"""
Ending = Literal["completed", "failed", "expired", "cancelled"]
Row = tuple[str | None, dict[str, Any]]  # owner, object as the API shows it


class Store:
    """``used`` is how many bytes are kept, as far as they count: files, and answers that are to become files."""

    def __init__(self, folder: Path, settings: BatchSettings) -> None:
        """Raises ConfigError when the folder cannot be used, or another server uses it."""
        self.settings, self._lock = settings, threading.RLock()
        self._folder = folder / "files"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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

    # -- files -----------------------------------------------------------------------------------------------------
    def add_file(
        self, source: BinaryIO, size: int, owner: str | None, filename: str, purpose: str, seconds: int | None
    ) -> dict[str, Any]:
        """Keep what is in ``source``; ``seconds``: for how long. ``filename`` is only shown, and never a path."""
        self._forget_expired()
        self.check_room(size)
        id = _new_file()
        with self._new(id):
            with self.path(id).open("xb") as target:
                shutil.copyfileobj(source, target, 2**20)
                _sync(target)
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

    # -- batches ---------------------------------------------------------------------------------------------------
    def add_batch(self, owner: str | None, batch: dict[str, Any]) -> None:
        """Raises 507 when its output would find no room, 429 when too many have not ended, 400 without its input."""
        self.check_room()
        with self._change() as db:
            if self.file(batch["input_file_id"], owner) is None:
                raise ApiError(404, f"no such file: {batch['input_file_id'][:64]}", param="input_file_id")
            (count,) = db.execute("SELECT count(*) FROM batches").fetchone()
            if count >= self.settings.max_batches:
                gone = db.execute(
                    "DELETE FROM batches WHERE seq = (SELECT min(seq) FROM batches WHERE NOT open)"
                ).rowcount
                if not gone:
                    message = f"{count} batches have not ended, and this server takes no more (--max-batches)"
                    raise ApiError(429, message, code="too_many_batches", headers={"Retry-After": "60"})
            columns = "id, owner, input_file_id, open, object"
            values = (batch["id"], owner, batch["input_file_id"], 1, msgspec.json.encode(batch))
            db.execute(f"INSERT INTO batches ({columns}) VALUES (?, ?, ?, ?, ?)", values)

    def batch(self, id: str, owner: str | None) -> dict[str, Any] | None:
        return next((batch for _, batch in self._batches("id = ? AND owner IS ?", (id, owner))), None)

    def batches(self, owner: str | None, limit: int, after: str | None) -> list[dict[str, Any]]:
        """The newest first."""
        where, values = "owner IS ?", [owner]
        if after is not None:
            where, values = f"{where} AND seq < (SELECT seq FROM batches WHERE id = ?)", [owner, after]
        return [batch for _, batch in self._batches(f"{where} ORDER BY seq DESC LIMIT {int(limit)}", values)]

    def open_batches(self) -> list[Row]:
        """Of all owners, the oldest first."""
        return self._batches("open ORDER BY seq", ())

    def _batches(self, where: str, values: Iterable[Any]) -> list[Row]:
        with self._lock:
            rows = self._db.execute(f"SELECT owner, object FROM batches WHERE {where}", tuple(values)).fetchall()
        return [(owner, msgspec.json.decode(object)) for owner, object in rows]

    def update_batch(self, id: str, when: Collection[str] = (), **changes: Any) -> dict[str, Any] | None:
        """The batch, with these fields if its status is one of ``when``; None when it has ended."""
        with self._change() as db:
            rows = self._batches("id = ? AND open", (id,))
            if not rows:
                return None
            batch = rows[0][1]
            return _save(db, {**batch, **changes}) if batch["status"] in when else batch

    def record(self, id: str, line: int, good: bool, output: bytes) -> None:
        """Keep a line's answer and count it, in one: it will not be run again. Too late for a batch that has ended."""
        with self._change() as db:
            rows = self._batches("id = ? AND open", (id,))
            if not rows:
                return
            db.execute("INSERT INTO results VALUES (?, ?, ?, ?)", (id, line, good, output))
            rows[0][1]["request_counts"]["completed" if good else "failed"] += 1
            _save(db, rows[0][1])
            self.used += len(output)

    def recorded(self, id: str) -> set[int]:
        """The lines that have their answers."""
        with self._lock:
            return {line for (line,) in self._db.execute("SELECT line FROM results WHERE batch = ?", (id,))}

    def end_batch(
        self, id: str, status: Ending, unanswered: Iterable[bytes] = (), seconds: int | None = None, **changes: Any
    ) -> None:
        """Make files of its answers, in the order of the input, and end it; all that, or nothing.

        ``unanswered`` are lines for the end of the error file, ``seconds`` how long both files are kept.
        """
        output, errors = _new_file(), _new_file()
        with self._new(output, errors), self._change() as db:
            rows = self._batches("id = ? AND open", (id,))
            if not rows:
                return
            owner, batch = rows[0]
            for name, file_id, good, more in (("output", output, 1, ()), ("error", errors, 0, unanswered)):
                answers = db.execute(
                    "SELECT output FROM results WHERE batch = ? AND good = ? ORDER BY line", (id, good)
                )
                recorded, added = self._write(file_id, (output for (output,) in answers), more)
                if recorded + added:
                    batch[f"{name}_file_id"] = file_id
                    self._insert_file(db, file_id, owner, f"{id}_{name}.jsonl", "batch_output", seconds)
                else:
                    self.path(file_id).unlink()
                batch["request_counts"]["failed"] += added
            db.execute("DELETE FROM results WHERE batch = ?", (id,))
            _save(db, {**batch, **changes, "status": status, f"{status}_at": int(time.time())})
            db.execute("UPDATE batches SET open = 0 WHERE id = ?", (id,))
        with self._lock:
            self.used = self._count()

    def _write(self, file_id: str, answers: Iterable[bytes], more: Iterable[bytes]) -> tuple[int, int]:
        """How many lines of either there were."""
        counts = []
        with self.path(file_id).open("xb") as file:
            for lines in (answers, more):
                count = 0
                for count, line in enumerate(lines, 1):  # noqa: B007
                    file.write(line)
                counts.append(count)
            _sync(file)
        return counts[0], counts[1]


def _new_file() -> str:
    return f"file-{uuid.uuid4().hex}"


def _save(db: sqlite3.Connection, batch: dict[str, Any]) -> dict[str, Any]:
    db.execute("UPDATE batches SET object = ? WHERE id = ?", (msgspec.json.encode(batch), batch["id"]))
    return batch


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
