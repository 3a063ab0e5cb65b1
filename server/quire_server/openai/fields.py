"""Request fields that completions and chat share, and how they become SamplingParams."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, PlainValidator, StringConstraints

from quire.sampling.params import SamplingParams, StructuredOutputs
from quire_server.errors import refuse
from quire_server.limits import Limits
from quire_server.openai.base import Strict
from quire_server.openai.structure import ResponseFormat, outputs_of
from quire_server.record import REQUEST_ID

T = TypeVar("T")
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]


AT_ONCE = 2**16  # token ids that are looked at before other threads get their turn: 2 ms


def token_ids(value: Any) -> list[int]:
    """A list of token ids, checked without a look at each from Python: prompts have up to millions."""
    if not isinstance(value, list):
        raise ValueError("must be a list of token ids")
    for begin in range(0, len(value), AT_ONCE):
        some = value[begin : begin + AT_ONCE]
        if not set(map(type, some)) <= {int}:
            raise ValueError("must be a list of token ids")
        if min(some) < 0 or max(some) >= 2**31:
            raise ValueError("token ids are at least 0 and below 2147483648")
    return value


def _not_huge(value: Any) -> Any:
    """A dict reports every wrong value: bound how many there can be before they are looked at."""
    if isinstance(value, dict) and len(value) > 2**16:
        raise ValueError(f"has {len(value)} entries, more than any vocabulary needs")
    return value


TokenIds = Annotated[list[int], PlainValidator(token_ids, json_schema_input_type=list[TokenId])]
# fail_fast: a list of a million wrong elements is one error, not a million.
Texts = Annotated[list[str], Field(fail_fast=True)]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], BeforeValidator(_not_huge), Field(max_length=16)]
CacheKey = Annotated[
    str,
    Field(max_length=512, description="Equal prefixes are reused without it as with it; cache_salt separates them."),
]
Stop = str | Texts


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "guided_json": ((), "vLLM has removed it: use structured_outputs: {json: ...} or response_format"),
    "guided_regex": ((), "vLLM has removed it: use structured_outputs: {regex: ...}"),
    "guided_choice": ((), "vLLM has removed it: use structured_outputs: {choice: [...]}"),
    "guided_grammar": ((), "vLLM has removed it: use structured_outputs: {grammar: ...}"),
    "guided_decoding_backend": ((), "there is one backend"),
    "guided_whitespace_pattern": ((), "use structured_outputs: {whitespace_pattern: ...}"),
    "structural_tag": ((), "use response_format of type structural_tag"),
    "use_beam_search": ((False,), "beam search is offered by the Python API (LLM.beam_search), not by this server"),
    "length_penalty": ((1, 1.0), "it acts only in beam search, which this server does not offer"),
    "early_stopping": ((False,), "it acts only in beam search, which this server does not offer"),
    "logits_processors": ((), "code from a request is never run"),
    "kv_transfer_params": ((), "prefill and decode on different workers is not supported yet"),
    "mm_processor_kwargs": ((), "only text is supported"),
    "ec_transfer_params": ((), "only text is supported"),
    "mm_payload": ((), "only text is supported"),
    "return_mm_kwargs": ((False,), "only text is supported"),
    "prompt_embeds": ((), "tensors of a request are never read: send text or token ids"),
    "logprob_token_ids": ((), "the likeliest tokens are told (top_logprobs), not chosen ones"),
    "repetition_detection": ((), "use repetition_penalty, or stop"),
    "return_token_offsets": ((False,), "completions' logprobs have text_offset"),
    "routed_experts_prompt_start": ((0,), "which experts were used is not told"),
    "session_id": ((), "equal prefixes are reused without it"),
    "stream_interval": ((1,), "each step of the engine is an event; what a slow reader has not taken is merged"),
    "thinking_token_budget": ((), "max_completion_tokens bounds reasoning and answer together"),
    "vllm_xargs": ((), "no extension of this server reads them"),
    "watermarking": ((False,), "answers carry no watermark"),
    "service_tier": (("auto", "default"), "this server has one tier"),
    "moderation": ((), "this server moderates nothing"),
}
"""Fields that clients know and this server cannot honour: (values that ask for nothing, why others are refused)."""


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    refused = {"include_obfuscation": ((False,), "this server adds no padding to events")}  # noqa: RUF012


class GenerationFields(Strict):
    """OpenAI's sampling fields and vLLM's extra ones, with vLLM's names and meanings."""

    refused = REFUSED

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] = 1
    temperature: float | None = None
    top_p: float | None = None
    seed: Seed | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[str, float], BeforeValidator(_not_huge)] | None = None
    stop: Stop | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Shown in the server's log.")

    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    allowed_token_ids: TokenIds | None = None
    bad_words: Texts | None = None
    prompt_logprobs: Int32 | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    truncation_side: Literal["left", "right"] | None = Field(None, description="Which end is cut off: left.")
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = Field(
        None, description="vLLM's: one of json, json_object, regex, choice, grammar, structural_tag."
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    request_id: Annotated[str, Field(pattern=REQUEST_ID)] | None = Field(
        None, description="A part of the answer's id, where no header X-Request-Id has one."
    )
    priority: Int32 = 0
    deadline: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="Seconds in which the request must finish; what it has by then is the answer."
    )

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def structure_field(self) -> str:
        """The field that says what form the output must have."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    def structure(self) -> StructuredOutputs | None:
        """What form the output must have. Raises ApiError, or InvalidParameter."""
        asked = self.response_format.outputs() if self.response_format is not None else None
        if self.structured_outputs is None:
            return asked
        if asked is not None:
            raise refuse("structured_outputs", "structured_outputs: response_format is given too")
        return outputs_of(self.structured_outputs)

    def check(self, limits: Limits) -> None:
        """Refuse by name what is over a limit or contradicts another field."""
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise refuse("truncation_side", "truncation_side: only together with truncate_prompt_tokens")
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "stream_options: only allowed when stream is true")
        if self.prompt_logprobs is not None:
            if self.stream:
                raise refuse("prompt_logprobs", "prompt_logprobs: not available when stream is true")
            if self.prompt_logprobs < 0:
                raise refuse("prompt_logprobs", f"prompt_logprobs: must be at least 0, not {self.prompt_logprobs}")
            limits.at_most("prompt_logprobs", self.prompt_logprobs, "max_logprobs")
        limits.at_most("n", self.n, "max_n")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        _bounded_texts(limits, "stop", stops, "max_stop")
        _bounded_texts(limits, "bad_words", self.bad_words or [], "max_bad_words")
        limits.at_most("stop_token_ids", len(self.stop_token_ids or ()), "max_stop_token_ids")
        limits.at_most("allowed_token_ids", len(self.allowed_token_ids or ()), "max_allowed_token_ids")
        limits.at_most("logit_bias", len(self.logit_bias or ()), "max_logit_bias")

    def sampling(
        self,
        defaults: SamplingParams,
        *,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
        structure: StructuredOutputs | None,
    ) -> SamplingParams:
        """Where the request says nothing, the checkpoint's recommended ``defaults`` hold, as in vLLM.

        Raises InvalidParameter (a ValueError with ``.field``) for values that make no sense.
        """
        return SamplingParams(
            n=self.n,
            temperature=_or(self.temperature, defaults.temperature),
            top_p=_or(self.top_p, defaults.top_p),
            top_k=_or(self.top_k, defaults.top_k),
            min_p=_or(self.min_p, defaults.min_p),
            seed=self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=_or(self.repetition_penalty, defaults.repetition_penalty),
            logit_bias=_logit_bias(self.logit_bias),
            allowed_token_ids=self.allowed_token_ids,
            bad_words=self.bad_words,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            structured_outputs=structure,
        )


def _or(given: T | None, default: T) -> T:
    return default if given is None else given


def _bounded_texts(limits: Limits, name: str, texts: list[str], flag: str) -> None:
    limits.at_most(name, len(texts), flag)
    for text in texts:
        if len(text) > limits.max_stop_chars:
            raise refuse(
                name,
                f"{name}: a string of {len(text)} characters is over the limit of {limits.max_stop_chars} (--max-stop-chars)",
            )


def _logit_bias(given: dict[str, float] | None) -> dict[int, float] | None:
    """JSON's keys are strings; these must be token ids."""
    if not given:
        return None
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise refuse("logit_bias", f"logit_bias: the key {key[:40]!r} is not a token id")
        bias[int(key)] = value
    return bias
