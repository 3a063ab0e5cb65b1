"""Batches on disk, and the answers of their lines until they become files."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Iterable
from typing import Any, Literal

import msgspec

from quire_server.errors import ApiError
from quire_server.file_store import FileStore, new_file, sync

Ending = Literal["completed", "failed", "expired", "cancelled"]
Row = tuple[str | None, dict[str, Any]]  # owner, object as the API shows it


class Store(FileStore):
    """As of files, so of batches: what a method has returned from is on disk."""

    def add_batch(self, owner: str | None, batch: dict[str, Any]) -> None:
        """Raises 507 when its output would find no room, 429 when too many have not ended, 404 without its input."""
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
        output, errors = new_file(), new_file()
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
            sync(file)
        return counts[0], counts[1]


def _save(db: sqlite3.Connection, batch: dict[str, Any]) -> dict[str, Any]:
    db.execute("UPDATE batches SET object = ? WHERE id = ?", (msgspec.json.encode(batch), batch["id"]))
    return batch
