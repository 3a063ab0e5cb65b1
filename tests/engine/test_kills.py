"""bench/kills.py, shorter: a killed engine changes no token of any kind of request."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import kills


def test_killed_engines_change_no_answer_of_the_demo_model():
    tally = asyncio.run(kills.measure("demo", kills=5, streams=16, tokens=32))
    assert tally.kills >= 5
    assert tally.answers >= 16
    assert tally.failed == 0
    assert tally.different == 0
