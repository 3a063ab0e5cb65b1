"""From what a caller passes to an AddRequest: tokenized, bounded and validated, in the caller's process."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from quire.errors import RequestRefused
from quire.message import AddRequest
from quire.sampling.grammar import GrammarCompiler
from quire.sampling.params import DEFAULT_LIMITS, InvalidParameter, ParamLimits, SamplingParams, StructuredOutputs

if TYPE_CHECKING:
    from quire.text.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]


class InputProcessor:
    """Knows the model's limits and its tokenizer; holds no request."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        max_model_len: int,
        vocab_size: int,
        max_num_seqs: int,
        eos_token_ids: Sequence[int] = (),
        limits: ParamLimits = DEFAULT_LIMITS,
        check_grammar: Callable[[StructuredOutputs], None] | None = None,
    ) -> None:
        """``check_grammar`` raises InvalidParameter; None: grammars are compiled here."""
        self.tokenizer, self.limits = tokenizer, limits
        # The model's files and the tokenizer's may each name one; any of them ends a text, as in vLLM.
        self.eos_token_ids = list(dict.fromkeys([*eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())]))
        self._encode = None if tokenizer is None else lambda text: tokenizer.encode(text, add_special_tokens=False)
        if tokenizer is not None and check_grammar is None:
            check_grammar = GrammarCompiler(lambda: tokenizer, vocab_size, eos_token_ids).check
        self._check_grammar = None if tokenizer is None else check_grammar
        self.max_model_len, self.vocab_size, self.max_num_seqs = max_model_len, vocab_size, max_num_seqs

    def tokenize(self, prompt: Prompt, add_special_tokens: bool = True) -> tuple[str | None, list[int]]:
        """(text if there was one, token ids) of a text, a list of ids, or a dict with either. Raises RequestRefused."""
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
            if unknown:
                raise RequestRefused(f"prompt: unknown key {', '.join(sorted(unknown))}", "prompt")
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), self.check_ids(prompt["prompt_token_ids"])
            prompt = prompt.get("prompt", "")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestRefused(
                    "prompt: a text needs a tokenizer, and this model has none; pass token ids", "prompt"
                )
            return prompt, self.check_ids(self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens))
        return None, self.check_ids(prompt)

    def check_ids(self, token_ids: Any) -> list[int]:
        """The prompt's ids as a list, each inside the vocabulary and together inside the context."""
        if not isinstance(token_ids, Sequence) or isinstance(token_ids, str | bytes):
            raise RequestRefused(f"prompt: expected a text or token ids, got {type(token_ids).__name__}", "prompt")
        ids = list(token_ids)
        if not ids:
            raise RequestRefused("prompt: is empty; at least one token is needed", "prompt")
        if len(ids) >= self.max_model_len:
            raise RequestRefused(
                f"prompt: {len(ids)} tokens leave no room for output; this model's context is {self.max_model_len} tokens",
                "prompt",
            )
        for token in ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise RequestRefused(
                    f"prompt: {token!r} is not a token id between 0 and {self.vocab_size - 1}", "prompt"
                )
        return ids

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
        strict: bool = False,
        limits: ParamLimits | None = None,
    ) -> tuple[str | None, AddRequest]:
        """(prompt text, message). ``strict`` refuses a max_tokens beyond the context instead of shortening it."""
        text, ids = self.tokenize(prompt, add_special_tokens)
        if isinstance(prompt, Mapping) and cache_salt is None:
            cache_salt = prompt.get("cache_salt")
        room = self.max_model_len - len(ids)
        if params.max_tokens is not None and params.max_tokens > room and strict:
            raise RequestRefused(
                f"max_tokens = {params.max_tokens}: this model's context is {self.max_model_len} tokens and the prompt "
                f"takes {len(ids)} of them, so at most {room} can follow",
                "max_tokens",
            )
        if params.n > self.max_num_seqs:
            raise RequestRefused(f"n = {params.n}: this server runs at most {self.max_num_seqs} sequences at once", "n")
        params = params.resolve(self.vocab_size, self.max_model_len, len(ids), self._encode, limits or self.limits)
        if params.structured_outputs is not None:
            if self._check_grammar is None:
                raise InvalidParameter(
                    "structured_outputs", params.structured_outputs, "needs a tokenizer, and this model has none"
                )
            self._check_grammar(params.structured_outputs)
        message = AddRequest(
            request_id=request_id,
            prompt_token_ids=ids,
            sampling=params,
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            eos_token_ids=self.eos_token_ids,
            priority=priority,
            arrival=time.monotonic(),
            deadline=deadline,
            cache_salt=cache_salt,
        )
        return text, message
