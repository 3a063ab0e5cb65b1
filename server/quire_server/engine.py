"""The one thing the server knows of the engine. ``quire.AsyncLLM`` is it; tests put a fake in its place."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from quire.message import EngineReady, EngineStats
    from quire.outputs import RequestOutput
    from quire.sampling.params import SamplingParams


class EngineClient(Protocol):
    """An engine in another process. Nothing here blocks the event loop."""

    @property
    def text(self) -> Any:
        """quire.text.checkpoint.TextFiles, once started."""
        ...

    @property
    def info(self) -> EngineReady: ...

    @property
    def errored(self) -> bool:
        """Whether the engine is gone for good, and not merely being started again."""
        ...

    async def start(self) -> None: ...

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Deltas. Raises ValueError (with ``.field``) before anything is sent; closing it ends the request."""
        ...

    async def stats(self, pages: bool = False, timeout: float = 5.0) -> EngineStats: ...

    async def shutdown(self, drain_seconds: float = 0.0) -> None: ...
