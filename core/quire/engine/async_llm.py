"""The asynchronous engine: what the server, or any asyncio program, talks to. The engine runs in its own process."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from quire.config import EngineConfig
from quire.engine.client import EngineProcess
from quire.engine.inputs import InputProcessor, Prompt
from quire.engine.outputs import RequestState, merge
from quire.engine.spare import Spare
from quire.errors import EngineDead, QueueFull, RequestRefused
from quire.message import EngineReady, EngineStats, SampleOutput
from quire.outputs import RequestOutput
from quire.sampling.grammar_worker import GrammarChecker
from quire.sampling.params import DEFAULT_LIMITS, ParamLimits, SamplingParams

if TYPE_CHECKING:
    from quire.text.checkpoint import TextFiles
    from quire.text.tokenizer import Tokenizer

LONG_PROMPT = 4096  # characters or tokens


class _Stream:
    """What a request has produced and its reader has not taken: merged into one item, however slow the reader."""

    def __init__(self, state: RequestState) -> None:
        self.state = state
        self.pending: RequestOutput | None = None
        self.error: Exception | None = None
        self.news = asyncio.Event()


class AsyncLLM:
    """``start()`` once, then ``generate()`` any number of times at once, then ``shutdown()``."""

    def __init__(self, config: EngineConfig, limits: ParamLimits = DEFAULT_LIMITS, spare: Spare | None = None) -> None:
        """``limits``: how much one request may ask for; ``spare``: the spare process of several engines."""
        self.config, self.limits, self._spare = config, limits, spare
        self.engine: EngineProcess | None = None
        self.text: TextFiles | None = None
        self.inputs: InputProcessor | None = None
        self._grammars: GrammarChecker | None = None
        # Slow grammars wait for one another here; long prompts, in asyncio's own threads, do not wait for them.
        self._grammar_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="quire-grammar-check")

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.text.tokenizer if self.text is not None else None

    @property
    def info(self) -> EngineReady:
        if self.engine is None or self.engine.info is None:
            raise EngineDead("the engine is starting")
        return self.engine.info

    @property
    def errored(self) -> bool:
        """Whether the engine is gone for good."""
        return self.engine is not None and self.engine.failure is not None

    @property
    def open_requests(self) -> int:
        return self.engine.open_requests if self.engine is not None else 0

    async def start(self) -> None:
        """Start the engine process and read the tokenizer meanwhile. Raises EngineDead with the reason it gave."""
        self.engine = EngineProcess(self.config, spare=self._spare)
        self.engine.spawn()
        try:
            if not self.config.skip_tokenizer_init:
                self.text = await asyncio.to_thread(self._open_text)
            ready = await self.engine.started()
        except BaseException:
            await self.engine.close()
            raise
        self._grammars = GrammarChecker(self.config, ready.vocab_size, ready.eos_token_ids)
        self.inputs = InputProcessor(
            self.tokenizer,
            ready.max_model_len,
            ready.vocab_size,
            self.config.scheduler.max_num_seqs,
            ready.eos_token_ids,
            self.limits,
            self._grammars.check,
        )

    def _open_text(self) -> Any:
        from quire.text.checkpoint import open_text

        return open_text(self.config)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
    ) -> AsyncIterator[RequestOutput]:
        """Deltas of one request as they come. Leaving the iterator early ends the request in the engine.

        Raises RequestRefused (or InvalidParameter) before anything is sent, QueueFull when too many wait, EngineDead.
        """
        if self.engine is None or self.inputs is None:
            raise EngineDead("the engine has not been started")
        request_id = request_id or uuid.uuid4().hex
        prepare = partial(
            self.inputs.request, prompt, sampling_params, request_id, priority=priority, deadline=deadline,
            cache_salt=cache_salt, add_special_tokens=add_special_tokens, strict=True,
        )  # fmt: skip
        # A long text takes milliseconds to tokenize, a grammar to compile: off the event loop. A short text is quicker
        # than the thread.
        if sampling_params.structured_outputs is not None:
            loop = asyncio.get_running_loop()
            text, message = await loop.run_in_executor(self._grammar_thread, prepare)
        else:
            text, message = await asyncio.to_thread(prepare) if len(prompt) > LONG_PROMPT else prepare()
        stream = _Stream(RequestState(message, text, self.tokenizer))
        self.engine.add(message, lambda output: self._deliver(stream, output))
        try:
            while True:
                await stream.news.wait()
                stream.news.clear()
                item, stream.pending = stream.pending, None
                if stream.error is not None:
                    raise stream.error
                if item is not None:
                    yield item
                    if item.finished:
                        return
        finally:
            if not stream.state.finished:
                self.engine.abort(request_id)

    def _deliver(self, stream: _Stream, output: SampleOutput) -> None:
        if output.error_kind is not None:
            stream.error = {"queue_full": QueueFull, "refused": RequestRefused}[output.error_kind](output.error or "")
        else:
            delta = stream.state.update(output)
            if delta is None:
                return
            stream.pending = merge(stream.pending, delta)
            if stream.state.stopped:
                assert self.engine is not None
                self.engine.abort_samples(output.request_id, stream.state.stopped)
                stream.state.stopped = []
        stream.news.set()

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator, if it has one, ends with finish_reason "abort"."""
        if self.engine is not None:
            self.engine.abort(request_id, tell=True)

    async def stats(self, pages: bool = False, timeout: float = 5.0) -> EngineStats:
        """Ask the engine. Raises EngineDead, or TimeoutError when it does not answer in time."""
        if self.engine is None:
            raise EngineDead("the engine has not been started")
        return await self.engine.stats(pages, timeout)

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        """End the engine; with ``drain_seconds``, let open requests finish for so long."""
        if self.engine is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + drain_seconds
        while self.engine.open_requests and loop.time() < deadline:
            await asyncio.sleep(0.02)
        await self.engine.close()
        if self._grammars is not None:
            await asyncio.to_thread(self._grammars.close)
        self._grammar_thread.shutdown(wait=False, cancel_futures=True)
