"""gpt-oss: the analysis channel of Harmony is reasoning. Calls are in the same messages, so one parser reads both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire_server.tool_parsers.harmony import Harmony


class GptOss(Harmony):
    reads_calls = Harmony
    STARTS = ("<|channel|>analysis<|message|>",)
    ENDS = ("<|end|><|start|>assistant<|channel|>final<|message|>",)

    def __init__(self, inside: bool | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(tools)
