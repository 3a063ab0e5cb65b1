"""The whole vocabulary that crosses a process: msgspec structs, encoded as msgpack. Nothing is ever unpickled.

Client to engine: :class:`AddRequest`, :class:`AbortRequest`, :class:`StatsQuery`, :class:`Shutdown`.
Engine to client: :class:`StepOutputs`, :class:`EngineStats`, :class:`EngineReady`, :class:`EngineFailure`.
Scheduler to runner: :class:`StepPlan`; runner to scheduler: :class:`StepResult`.
"""

from __future__ import annotations

import msgspec

from quire.sampling.params import SamplingParams


class AddRequest(msgspec.Struct, tag="add", kw_only=True, omit_defaults=True):
    """A validated request. ``output_token_ids`` holds, per sample, what an earlier engine already produced: the
    engine goes on from there and never sends them again (DESIGN's invariant 3)."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    seed: int  # always set: the client draws one when the caller gave none
    eos_token_ids: list[int] = []
    priority: int = 0  # lower runs earlier, as in vLLM
    arrival: float = 0.0  # time.monotonic() of the client, for latency metrics and first-come order
    deadline: float | None = None  # seconds after arrival in which the request must finish
    cache_salt: str | None = None  # requests share cached pages only with the same salt
    adapter: str | None = None
    output_token_ids: list[list[int]] = []
    finished_samples: list[int] = []  # samples that were already finished: nothing more is computed for them
    resumed: bool = False  # it was accepted before, so it is queued however many wait
    probe: int = 0  # end each sample that has not ended at this many output tokens, with reason "probe"; 0: never


class AbortRequest(msgspec.Struct, tag="abort"):
    """End whole requests, or single samples (request id, index) of them, whose stop string the client has seen."""

    request_ids: list[str]
    samples: list[tuple[str, int]] = []


class StatsQuery(msgspec.Struct, tag="stats?"):
    query_id: int
    pages: bool = False  # also the state of every page


class Shutdown(msgspec.Struct, tag="shutdown"):
    drain: bool = True


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Of one position: the chosen (or prompt) token first, then the most likely ones, best first.

    ``ranks[0]`` is the chosen token's rank (1 is the most likely); the rest count up from 1.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class SampleOutput(msgspec.Struct, array_like=True, omit_defaults=True):
    """What one step gave one sample (``index`` of ``n``) of a request."""

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None  # stop, length, abort, error, deadline; probe, which no caller sees
    stop_token_id: int | None = None  # the token that stopped it, when one did
    error: str | None = None
    error_kind: str | None = None  # refused, queue_full, or None for what failed while running
    num_cached_tokens: int = 0
    scheduled: float | None = None  # with the first output: time.monotonic() of the request's first step


STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of the sizes of steps that EngineStats counts, in tokens; what is above them comes last."""


class SequenceState(msgspec.Struct, array_like=True):
    """One sample as somebody who looks at the engine sees it. Numbers and its name, nothing of its tokens."""

    request_id: str
    index: int
    state: str  # running, waiting (new or preempted), swapped
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int  # with keys and values, or planned to be
    age: float  # seconds since it arrived
    pages: list[list[int]]  # per KV group, those it holds on the device


class EngineStats(msgspec.Struct, tag="stats", kw_only=True, omit_defaults=True):
    """Counters since the start and gauges of now."""

    query_id: int = 0
    running: int = 0
    waiting: int = 0
    swapped: int = 0
    preemptions: int = 0
    steps: int = 0
    pages_total: int = 0
    pages_free: int = 0  # never used or evictable at once
    pages_cached: int = 0  # of the free ones, those that hold a reusable prefix
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    prompt_tokens: int = 0
    generation_tokens: int = 0
    kv_waste: float = 0.0  # share of owned page slots that hold no token
    last_step: float = 0.0  # time.monotonic() when a step last ended
    batch_tokens: int = 0  # tokens in the last step
    batch_requests: int = 0
    step_sizes: list[int] = msgspec.field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))  # steps by STEP_TOKENS
    step_tokens: int = 0  # of all steps together
    step_running_for: float = 0.0  # seconds since the step in flight began; 0: none
    pages: list[bytes] | None = None  # when asked: per KV group a byte per page, its state as in quire.kv.accounts
    sequences: list[SequenceState] | None = None  # with pages: who runs, then the first who wait; bounded


class StepOutputs(msgspec.Struct, tag="outputs"):
    outputs: list[SampleOutput]


class EngineReady(msgspec.Struct, tag="ready", kw_only=True):
    device: str
    max_model_len: int
    pages: int
    page_size: int
    vocab_size: int
    eos_token_ids: list[int] = []
    report: str = ""  # the memory arithmetic, as text
    tasks: tuple[str, ...] = ("generate",)  # what the model can do; one that pools would say embed or score


class EngineFailure(msgspec.Struct, tag="failure"):
    message: str
    kind: str = "error"  # the exception's name


class NewRow(msgspec.Struct, array_like=True):
    """A sequence the runner has not seen (or no longer knows): what it needs once.

    With ``forked_from`` >= 0, ``token_ids`` is empty and the row starts with the first ``prompt_len`` tokens of that
    row (which are all that row has when this plan starts). Its block table comes in ``StepPlan.pages`` as any other.
    """

    row: int
    request_id: str
    index: int
    token_ids: list[int]  # prompt, and for a resumed sequence what it produced
    prompt_len: int
    sampling: SamplingParams
    seed: int  # unsigned 64 bits, made of the request's seed and the index
    eos_token_ids: list[int] = []
    forked_from: int = -1


class StepPlan(msgspec.Struct, kw_only=True):
    """One step, as flat integers. Sequence i of the step is runner row ``rows[i]``: it computes ``counts[i]`` tokens
    that follow ``starts[i]`` computed ones. Order of effects: released, admitted, swap_out, swap_in, copies, pages,
    compute, sample. Inside one list the order does not matter, except in ``pages``: a page is the target of at most one
    swap_in or copy, and the source of a copy is the target of neither. All entries of a row's block table that
    attention may read come in ``pages``, also after a row is admitted again; those that a window has passed come as 0.

    A token whose id is not known when the step is planned (it is sampled by the step before) is simply a position
    beyond the row's known tokens: the runner fills it in, since it runs steps in order.
    """

    step: int
    rows: list[int]
    starts: list[int]
    counts: list[int]
    sample_from: list[int] = []  # index into rows: whose last position gives the logits ...
    sample_rows: list[int] = []  # ... for this row's next token (several rows may share one source when n > 1)
    admitted: list[NewRow] = []
    released: list[int] = []  # rows that are free from now on
    pages: list[tuple[int, int, int, list[int]]] = []  # (row, group, first table index, page ids): block table writes
    copies: list[tuple[int, int, int]] = []  # (group, from page, to page), on the device
    swap_out: list[tuple[int, int, int]] = []  # (group, device page, host page)
    swap_in: list[tuple[int, int, int]] = []  # (group, host page, device page)
    prompt_logprobs: list[int] = []  # indices into rows whose prompt positions of this step want logprobs

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


class RowError(msgspec.Struct, array_like=True):
    """Ends the whole request of ``row`` (an element of the plan's ``rows`` or ``sample_rows``) with this message."""

    row: int
    message: str


class StepResult(msgspec.Struct, kw_only=True):
    """``token_ids[j]`` was sampled for ``sample_rows[j]`` of the plan of the same step (anything for a row in error).

    ``prompt_logprobs[i]``, for each i in the plan's list: one entry per computed position p with
    ``starts[i] <= p < min(starts[i] + counts[i], prompt_len - 1)``, about the token at p + 1.
    """

    step: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] = []
    prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}  # by index into the plan's rows
    errors: list[RowError] = []


ToEngine = AddRequest | AbortRequest | StatsQuery | Shutdown
ToClient = StepOutputs | EngineStats | EngineReady | EngineFailure
