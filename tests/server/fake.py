"""An engine client without an engine: a byte tokenizer and a token stream that follows from the prompt and the seed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

from quire.errors import EngineDead, EngineRestarting, QueueFull, RequestRefused
from quire.message import EngineReady, EngineStats
from quire.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from quire.sampling.params import SamplingParams
from quire.text.chat import ChatTemplate, prepare_messages

EOS = 256
VOCAB = 300
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function | tojson }}]"
    "{% endfor %}</{{ m.role }}>{% endfor %}{% if tools %}TOOLS{{ tools | tojson }}<tool_call>{% endif %}"
    "{% if enable_thinking %}<think>{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Two-, three- and four-byte characters, so that deltas fall inside them.
SCRIPT = "Prüfung: 春の海 終日のたり 🙂 and so on, one word after another. "


class FakeTokenizer:
    def __init__(self) -> None:
        self.chat_templates = {"default": TEMPLATE}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Any, add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, token_ids: Any, skip_special_tokens: bool = True) -> str:
        return b"".join(self.token_bytes(t) for t in token_ids).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def token_to_id(self, token: str) -> int | None:
        return EOS if token == "<eos>" else None

    def is_special(self, token_id: int) -> bool:
        return token_id == EOS

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<eos>" if token_id == EOS else b"<?>"


TOKENIZER = FakeTokenizer()


class FakeText:
    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()

    def default_sampling(self) -> SamplingParams:
        return SamplingParams()

    def render_chat(self, messages: Any, template: str, **variables: Any) -> str:
        return ChatTemplate(template).render(prepare_messages(messages), **variables)


class FakeLLM:
    """``delay`` seconds between tokens. What happened to requests is in ``opened``, ``running`` and ``aborted``."""

    def __init__(self, delay: float = 0.0, max_model_len: int = 4096) -> None:
        self.delay = delay
        self.text = FakeText()
        self._info = EngineReady(device="fake", max_model_len=max_model_len, pages=64, page_size=16, vocab_size=VOCAB)
        self.up = threading.Event()
        self.up.set()
        self.hangs = False
        self.dead: str | None = None
        self.errored = False
        self.restarting = False
        self.full = False
        self.fails_after: int | None = None
        self.breaks_after: int | None = None
        self.opened: list[tuple[str, SamplingParams, dict[str, Any]]] = []
        self.running: set[str] = set()
        self.aborted: set[str] = set()
        self.script: str | None = None  # what samples say instead of SCRIPT
        self.shut = False

    @property
    def info(self) -> EngineReady:
        return self._info

    async def start(self) -> None:
        while not self.up.is_set():
            await asyncio.sleep(0.01)
        if self.dead:
            raise EngineDead(self.dead)

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        p, ids = sampling_params, prompt["prompt_token_ids"]
        assert request_id is not None
        if self.dead:
            raise EngineDead(self.dead)
        if self.full:
            raise QueueFull("100 requests wait already (--max-waiting)")
        if any(t >= VOCAB for t in ids):
            raise RequestRefused(f"prompt: {max(ids)} is not a token id below {VOCAB}", "prompt")
        assert request_id not in self.running
        self.opened.append((request_id, p, {"priority": priority, "deadline": deadline, "cache_salt": cache_salt}))
        self.running.add(request_id)
        finished = False
        metrics = RequestMetrics(arrival_time=0.0, first_scheduled_time=0.25, first_token_time=1.0, last_token_time=2.0)
        try:
            samples = [_FakeSample(j, ids, p, self.script) for j in range(p.n)]
            step = 0
            while not finished:
                await asyncio.sleep(self.delay)
                if self.breaks_after is not None and step >= self.breaks_after:
                    raise RuntimeError(f"an unforeseen error about {prompt}")
                news = [s.step() for s in samples if s.reason is None]
                finished = all(s.reason is not None for s in samples)
                error = None
                if self.fails_after is not None and step >= self.fails_after:
                    finished, error, news[0].finish_reason = True, "a kernel failed", "error"
                yield RequestOutput(
                    request_id=request_id,
                    prompt=prompt["prompt"],
                    prompt_token_ids=ids,
                    outputs=news,
                    finished=finished,
                    prompt_logprobs=_prompt_logprobs(ids, p.prompt_logprobs) if step == 0 else None,
                    num_cached_tokens=3,
                    metrics=metrics,
                    error=error,
                )
                step += 1
        finally:
            self.running.discard(request_id)
            if not finished:
                self.aborted.add(request_id)

    async def stats(self, pages: bool = False, timeout: float = 5.0) -> EngineStats:
        if self.dead:
            raise EngineDead(self.dead)
        if self.restarting:
            raise EngineRestarting("engine restarting")
        if self.hangs:
            await asyncio.sleep(timeout)
            raise TimeoutError
        return EngineStats(
            running=len(self.running),
            waiting=2,
            pages_total=64,
            pages_free=48,
            prefix_queries=10,
            preemptions=7,
            step_sizes=[0, 1, 0, 2] + [0] * 10,
            step_tokens=30,
        )

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        self.shut = True


class _FakeSample:
    """Bytes of SCRIPT from a place that prompt, seed and index choose; ends after 64 of them."""

    def __init__(self, index: int, prompt: list[int], params: SamplingParams, script: str | None) -> None:
        self.index, self.params = index, params
        start = (sum(prompt) + (params.seed or 0) + 5 * index) % len(SCRIPT)
        self.stream = (script or SCRIPT[start:] + SCRIPT[:start]).encode()
        self.end = len(self.stream) if script else 64
        self.count = 0
        self.buffer = b""
        self.text = ""  # decoded so far
        self.sent = 0  # characters of it already given out
        self.reason: str | None = None

    def step(self) -> CompletionOutput:
        p = self.params
        if not p.ignore_eos and self.count == self.end:
            token = EOS
        else:
            token = self.stream[self.count % len(self.stream)]
        self.count += 1
        stop_reason: Any = None
        if token == EOS:
            self.reason = "stop"
        else:
            self.buffer += bytes([token])
            self._decode()
            if self.count == p.max_tokens:
                self.reason = "length"
        held = 0
        for stop in [p.stop] if isinstance(p.stop, str) else p.stop or []:
            place = self.text.find(stop)
            if place >= 0:
                self.text, self.reason, stop_reason = self.text[:place], "stop", stop
                break
            held = max(held, len(stop) - 1)
        end = len(self.text) if self.reason else max(self.sent, len(self.text) - held)
        news, self.sent = self.text[self.sent : end], end
        logprobs = None if p.logprobs is None else [_row(token, p.logprobs)]
        return CompletionOutput(self.index, news, [token], None, logprobs, self.reason, stop_reason)

    def _decode(self) -> None:
        try:
            self.text += self.buffer.decode()
            self.buffer = b""
        except UnicodeDecodeError:
            pass


def _row(token: int, top: int) -> dict[int, Logprob]:
    """The chosen token is the second most likely; an impossible one has probability zero."""
    names = TOKENIZER
    row = {token: Logprob(-1.5, 2, names.token_text(token))}
    best = [(t, rank) for t, rank in ((65, 1), (token, 2), (66, 3), (67, 4)) if rank <= top]
    for t, rank in best:
        row.setdefault(t, Logprob(-float(rank) if rank < 4 else -float("inf"), rank, names.token_text(t)))
    return row


def _prompt_logprobs(ids: list[int], top: int | None) -> list[dict[int, Logprob] | None] | None:
    return None if top is None else [None, *(_row(t, top) for t in ids[1:])]
