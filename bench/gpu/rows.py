"""Rows of measurements, the goals they are held to, and what fell short. Needs the standard library alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

COPY, MATRIX = "ceiling: copy", "ceiling: bf16 product"


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none (``value`` None, ``why``).

    ``limit`` is what the card's ceilings allow, in ``unit``: for seconds the least, so that ``share`` = limit / value.
    """

    name: str
    value: float | None
    unit: str = "s"
    limit: float | None = None
    why: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        if not self.value or self.limit is None:
            return None
        return self.limit / self.value if self.unit == "s" else self.value / self.limit

    def text(self) -> str:
        """One line for people."""
        if self.value is None:
            return f"{self.name:52} not measured: {self.why}"
        shown = f"{self.value * 1e3:12.3f} ms" if self.unit == "s" else f"{self.value:12,.4g} {self.unit}"
        share = "" if self.share is None else f"  {self.share:6.1%} of the limit"
        return f"{self.name:52}{shown}{share}{''.join(f'  {k} {v}' for k, v in self.detail.items())}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


class Recorder:
    """A part's way out: rows are appended to a file and printed as they come, and those of earlier parts are there."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = {row.name: row for row in read(file)}

    def add(self, name: str, value: float, unit: str = "s", limit: float | None = None, **detail: Any) -> None:
        self._keep(Row(name, value, unit, limit, detail=detail))

    def missing(self, name: str, why: str) -> None:
        """Say why there is no number."""
        self._keep(Row(name, None, why=why.strip().replace("\n", " ")[:600]))

    def _keep(self, row: Row) -> None:
        self.rows[row.name] = row
        with self.file.open("a") as stream:
            stream.write(json.dumps(asdict(row)) + "\n")
        print(row.text(), flush=True)

    def ceiling(self, name: str) -> float | None:
        """Bytes or operations a second that the part ``ceilings`` measured."""
        row = self.rows.get(name)
        return None if row is None else row.value

    def least(self, moved: float, operations: float = 0.0) -> float | None:
        """Seconds that moving so many bytes and computing so many bf16 operations take at least, one beside the other."""
        copy, matrix = self.ceiling(COPY), self.ceiling(MATRIX)
        return None if copy is None or matrix is None else max(moved / copy, operations / matrix)


def read(file: Path) -> list[Row]:
    """Rows written so far; a line that was being written when its part ended is left out."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


Kind = Literal["share", "times", "cost", "at least", "at most"]


@dataclass(frozen=True)
class Goal:
    """What a row is to reach. ``share``: of the limit; ``times``: as fast as row ``of``; ``cost``: longer than ``of``."""

    title: str
    kind: Kind
    row: str
    bound: float
    of: str = ""

    def reached(self, rows: Mapping[str, Row]) -> float | None:
        """The number to compare with ``bound``; None where a row is missing."""
        row, other = rows.get(self.row), rows.get(self.of)
        if row is None or not row.value:
            return None
        if self.kind == "share":
            return row.share
        if self.kind in ("at least", "at most"):
            return row.value
        if other is None or not other.value:
            return None
        return other.value / row.value if self.kind == "times" else row.value / other.value - 1

    def judge(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        """What is printed and kept of this goal. One that could not be measured counts as short."""
        reached = self.reached(rows)
        upward = self.kind in ("share", "times", "at least")
        short = reached is None or (reached < self.bound if upward else reached > self.bound)
        why = ""
        if reached is None:
            absent = [rows[name].why for name in (self.row, self.of) if name in rows and rows[name].why]
            why = "; ".join(absent) or "it did not run"
        return {
            "title": self.title,
            "kind": self.kind,
            "bound": self.bound,
            "reached": reached,
            "short": short,
            "why": why,
        }

    def text(self, rows: Mapping[str, Row]) -> str:
        found = self.judge(rows)
        if found["reached"] is None:
            return f"not measured  {self.title:58} {found['why']}"
        mark = "FELL SHORT" if found["short"] else "held"
        return f"{mark:12}  {self.title:58} {self._number(found['reached']):>8}, goal {self._wanted()}"

    def _wanted(self) -> str:
        return f"{'at most ' if self.kind in ('cost', 'at most') else '>= '}{self._number(self.bound)}"

    def _number(self, value: float) -> str:
        if self.kind == "times":
            return f"{value:.2f} x"
        return f"{value:.1f} s" if self.kind == "at most" else f"{value:.1%}"


def goals() -> list[Goal]:
    """The table of issue 4, in its order."""
    bf16, quick = "8b bf16: ", "8b {}: "
    int4, fp8, fixed = (quick.format(kind) for kind in ("int4-128", "fp8", "bf16 batch-invariant"))
    return [
        Goal("decode attention, 64 sequences x 8k", "share", "attention: decode 64 x 8k", 0.85),
        Goal("decode attention, 1 x 128k", "share", "attention: decode 1 x 128k", 0.85),
        Goal("prefill attention, 8k, head 128, causal", "share", "attention: prefill 1 x 8k", 0.60),
        Goal("8B bf16 decode, batch 1", "share", f"{bf16}decode of 1", 0.85),
        Goal("8B bf16 decode, batch 64 at 1k", "share", f"{bf16}decode of 64", 0.75),
        Goal("8B bf16 decode, batch 256 at 1k", "share", f"{bf16}decode of 256", 0.75),
        Goal("8B bf16 prefill of 8k", "share", f"{bf16}prefill of 8k", 0.60),
        Goal("nano-vllm's benchmark: device busy", "at least", "0.6b: device busy", 0.90),
        Goal("int4 weights, 8B decode, batch 1, against bf16", "times", f"{int4}decode of 1", 3.0, f"{bf16}decode of 1"),
        Goal("int4 weights, 8B decode, batch 16, against bf16", "times", f"{int4}decode of 16", 2.5, f"{bf16}decode of 16"),
        Goal("fp8, 8B prefill of 8k, against bf16", "times", f"{fp8}prefill of 8k", 1.5, f"{bf16}prefill of 8k"),
        Goal("--batch-invariant, 8B decode, batch 64", "cost", f"{fixed}decode of 64", 0.15, f"{bf16}decode of 64"),
        Goal("--batch-invariant, 8B prefill of 8k", "cost", f"{fixed}prefill of 8k", 0.15, f"{bf16}prefill of 8k"),
        Goal("start: command to first token, 8B from disk cache", "at most", "start: first token", 15.0),
    ]  # fmt: skip


def verdict(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[str]]:
    """(every goal judged, the lines to print)."""
    table = {row.name: row for row in rows}
    return [goal.judge(table) for goal in goals()], [goal.text(table) for goal in goals()]


def part_parser(text: str | None) -> argparse.ArgumentParser:
    """The flags that every part takes."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="a device that a plugin registers (default: cuda)")
    parser.add_argument("--rows", type=Path, default=Path("gpu-rows.jsonl"), help="where rows are appended")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quire-gpu"), help="where checkpoints are written")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any device: does the script run at all?")
    return parser
