"""How many of an answer's tokens are reasoning, for ``completion_tokens_details``."""

from __future__ import annotations

from collections.abc import Callable

from quire.outputs import CompletionOutput
from quire_server.openai.responses_tokens import Ledger
from quire_server.tool_calls import AnswerParser, CallStart, Content, Event, Reasoning


class Thoughts:
    """Of one sample. It sees the engine's deltas, streamed answer or whole, so that both count the same."""

    def __init__(self, parser: AnswerParser | None, bytes_of: Callable[[int], bytes]) -> None:
        """``parser`` None: this model's reasoning is not told apart."""
        self._parser, self._ledger = parser, Ledger(bytes_of)

    @property
    def tokens(self) -> int:
        return self._ledger.reasoning

    def add(self, output: CompletionOutput) -> None:
        if self._parser is None:
            return
        self._ledger.add(output.token_ids, None)
        self._tell(self._parser.read(output.text))
        if output.finish_reason is not None:
            self._tell(self._parser.end())

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Content):
                self._ledger.text(event.text)
            elif isinstance(event, Reasoning):
                self._ledger.thought(event.text)
            elif isinstance(event, CallStart):
                self._ledger.call()
