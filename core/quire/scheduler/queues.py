"""The waiting queue and the deadlines: heaps whose dead entries are dropped when they surface or outnumber the rest."""

from __future__ import annotations

import heapq

from quire.scheduler.request import Request, Sequence, Status


class WaitingQueue:
    """Sequences in the order of their keys. O(log n) to push and pop, O(1) amortized to forget a finished one."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, float, int, int], Sequence]] = []
        self._dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.key, sequence))

    def peek(self) -> Sequence | None:
        heap = self._heap
        while heap:
            sequence = heap[0][1]
            if sequence.status is not Status.FINISHED:
                return sequence
            heapq.heappop(heap)
            self._dead -= 1
        return None

    def pop(self) -> Sequence:
        """The one that :meth:`peek` has just returned."""
        return heapq.heappop(self._heap)[1]

    def first(self, count: int) -> list[Sequence]:
        """Up to ``count`` from the head; the queue stays as it is."""
        heap = self._heap[:]
        found: list[Sequence] = []
        while heap and len(found) < count:
            sequence = heapq.heappop(heap)[1]
            if sequence.status is not Status.FINISHED:
                found.append(sequence)
        return found

    def forget(self) -> None:
        """A sequence in the queue has just become FINISHED."""
        self._dead += 1
        if self._dead > 32 and 2 * self._dead > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[1].status is not Status.FINISHED]
            heapq.heapify(self._heap)
            self._dead = 0


class Deadlines:
    """When requests must be finished."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []

    def push(self, request: Request, live: dict[str, Request]) -> None:
        assert request.deadline is not None
        if len(self._heap) > 64 + 2 * len(live):
            self._heap = [entry for entry in self._heap if self._alive(entry, live)]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (request.deadline, request.number, request.id))

    def expired(self, now: float, live: dict[str, Request]) -> list[Request]:
        heap, late = self._heap, []
        while heap and heap[0][0] <= now:
            entry = heapq.heappop(heap)
            if self._alive(entry, live):
                late.append(live[entry[2]])
        return late

    @property
    def empty(self) -> bool:
        return not self._heap

    @staticmethod
    def _alive(entry: tuple[float, int, str], live: dict[str, Request]) -> bool:
        request = live.get(entry[2])
        return request is not None and request.number == entry[1]
