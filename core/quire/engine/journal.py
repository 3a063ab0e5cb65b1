"""What the engine is doing, written where it outlives the engine: a small file that both processes map.

Before a step is queued, the requests in it are noted; when its results are taken in, the note goes. Whoever finds the
engine dead reads which requests it was working on, and how long a step has been running while it lives. A note costs a
few microseconds and no system call; the pages of a mapped file survive a SIGKILL. A request appears as a digest of
its id, so that a note has a fixed size.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

STEPS = 2  # that may be in flight
COMPILING = STEPS  # the slot after theirs: requests whose grammar is being compiled
_HEAD = struct.Struct("=dQBdB")  # loop busy since, request being taken in, planning, step since, new shape
_COUNT = struct.Struct("=I")


@lru_cache(maxsize=8192)  # a decode step asks for the same ones as the step before
def digest(request_id: str) -> int:
    """64 bits that stand for a request; never 0, which stands for none."""
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest(), "little") | 1


@dataclass(frozen=True)
class Record:
    """What a journal said when it was read."""

    requests: frozenset[int]  # digests: in a step in flight, being compiled or taken in
    planning: bool  # the engine's loop was deciding who runs next, or failed at that
    busy_for: float  # seconds that the engine's loop has been away from its sockets; 0: it waits there
    step_for: float  # seconds that the oldest step in flight has been running; 0: none
    new_shape: bool  # no step of its size has been run before: kernels may be compiled, graphs captured


class Journal:
    """One file for one engine process. ``rows``: most sequences in a step. The client creates, the engine opens."""

    def __init__(self, path: str | Path, rows: int, create: bool = False) -> None:
        self._slot = _COUNT.size + 8 * rows
        length = _HEAD.size + (STEPS + 1) * self._slot
        flags = os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0)
        handle = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o600)
        try:
            if create:
                os.ftruncate(handle, length)
            self._map = mmap.mmap(handle, length)
        finally:
            os.close(handle)

    # -- the engine writes -----------------------------------------------------------------------------------------
    def busy(self) -> None:
        """The loop turns from its sockets to work."""
        struct.pack_into("=d", self._map, 0, time.monotonic())

    def idle(self) -> None:
        """The loop waits for messages or for a step."""
        struct.pack_into("=d", self._map, 0, 0.0)

    def taking(self, request: int) -> None:
        """A message about this request is decoded and acted on; 0: no more."""
        struct.pack_into("=Q", self._map, 8, request)

    def planning(self, under_way: bool) -> None:
        """Who runs next is being decided, among all that wait and run. An error there leaves the note as it is."""
        struct.pack_into("=B", self._map, 16, under_way)

    def stepping(self, since: float, new_shape: bool) -> None:
        """The oldest step in flight runs since ``since`` (time.monotonic()); 0: none does."""
        struct.pack_into("=dB", self._map, 17, since, new_shape)

    def begin(self, step: int, requests: Iterable[int]) -> None:
        """A step is about to be queued."""
        self._note(step % STEPS, list(requests))

    def end(self, step: int) -> None:
        """Its results have been taken in."""
        self._note(step % STEPS, [])

    def compiling(self, request: int) -> None:
        """This request's grammar is being compiled; 0: none is."""
        self._note(COMPILING, [request] if request else [])

    def _note(self, slot: int, requests: list[int]) -> None:
        at = _HEAD.size + slot * self._slot
        struct.pack_into(f"={len(requests)}Q", self._map, at + _COUNT.size, *requests)
        _COUNT.pack_into(self._map, at, len(requests))

    # -- the client reads ------------------------------------------------------------------------------------------
    def read(self) -> Record:
        busy, taking, planning, since, new_shape = _HEAD.unpack_from(self._map, 0)
        found = {taking} if taking else set()
        for slot in range(STEPS + 1):
            at = _HEAD.size + slot * self._slot
            (count,) = _COUNT.unpack_from(self._map, at)
            found.update(struct.unpack_from(f"={count}Q", self._map, at + _COUNT.size))
        now = time.monotonic()
        return Record(
            frozenset(found),
            bool(planning),
            max(now - busy, 0.0) if busy else 0.0,
            max(now - since, 0.0) if since else 0.0,
            bool(new_shape),
        )

    def close(self) -> None:
        self._map.close()
