"""What one request may ask for. Every field is a flag of ``quire serve`` and is checked before the engine sees it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from quire.errors import ConfigError
from quire.sampling.params import ParamLimits


def excess(body: bytes, limits: Limits) -> str | None:
    """What the JSON text ``body`` has too much of, as "more ..." goes on; None: nothing. It costs milliseconds at most.

    No other thread has its turn while JSON is read, so the event loop waits: 74 ms were measured, on a busy machine, with as
    much as the limits allow. Strings, arrays and objects cost ten times what a number does.
    """
    if body.count(b",") < limits.max_body_values and _most_parts(body) <= limits.max_body_parts:
        return None
    # A backslash is only in strings, and strings are what stands between every other two quotes.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    pieces = plain.split(b'"', 2 * limits.max_body_parts + 1)
    if len(pieces) <= 2 * limits.max_body_parts + 1:
        outside = b"".join(pieces[::2])
        if outside.count(b",") >= limits.max_body_values:
            return f"JSON values than {limits.max_body_values}, this server's limit (--max-body-values)"
        if len(pieces) // 2 + outside.count(b"[") + outside.count(b"{") <= limits.max_body_parts:
            return None
    return f"strings, arrays and objects than {limits.max_body_parts}, this server's limit (--max-body-parts)"


def _most_parts(text: bytes) -> int:
    """At least as many as there are strings, arrays and objects."""
    return text.count(b'"') // 2 + text.count(b"[") + text.count(b"{")


def _limit(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    max_body_bytes: int = _limit(8 * 2**20, "bytes of a request's body")
    max_body_values: int = _limit(2**20, "JSON values in a request's body, token ids among them")
    max_body_parts: int = _limit(2**16, "strings, arrays and objects in a request's body")
    body_timeout: float = _limit(60.0, "seconds in which a request's body must have arrived")
    max_prompts: int = _limit(256, "prompts in one completions request")
    max_n: int = _limit(128, "samples (n) of one prompt")
    max_sequences: int = _limit(1024, "prompts times n of one request")
    max_logprobs: int = _limit(20, "logprobs, top_logprobs and prompt_logprobs")
    max_stop: int = _limit(16, "stop strings")
    max_stop_chars: int = _limit(1024, "characters of one stop string or bad word")
    max_stop_token_ids: int = _limit(256, "stop_token_ids")
    max_bad_words: int = _limit(256, "bad_words")
    max_logit_bias: int = _limit(1024, "entries of logit_bias")
    max_allowed_token_ids: int = _limit(32768, "allowed_token_ids")
    max_grammar_chars: int = _limit(131072, "characters of a JSON schema, regex, grammar or set of choices")
    max_messages: int = _limit(4096, "messages of one chat")
    max_tools: int = _limit(128, "tools of one chat")
    max_documents: int = _limit(128, "documents of one chat")
    max_template_kwargs: int = _limit(64, "chat_template_kwargs")
    max_template_chars: int = _limit(65536, "characters of a chat template in a request")

    def at_most(self, param: str, value: float, flag: str) -> None:
        """Refuse ``param`` when ``value`` is over the limit named ``flag``."""
        limit = getattr(self, flag)
        if value > limit:
            from quire_server.errors import refuse  # not above: it brings the web framework, and --help needs none

            raise refuse(
                param, f"{param}: {value} is more than this server's limit of {limit} (--{flag.replace('_', '-')})"
            )

    def of_engine(self) -> ParamLimits:
        """The same bounds for the engine client, which holds every request against them again."""
        return ParamLimits(
            n=self.max_n,
            logprobs=self.max_logprobs,
            stop=self.max_stop,
            stop_length=self.max_stop_chars,
            stop_token_ids=self.max_stop_token_ids,
            allowed_token_ids=self.max_allowed_token_ids,
            bad_words=self.max_bad_words,
            logit_bias=self.max_logit_bias,
            grammar_length=self.max_grammar_chars,
        )


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each limit."""
    group = parser.add_argument_group("limits of one request")
    for item in fields(Limits):
        group.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=type(item.default),
            default=item.default,
            help=f"{item.metadata['help']} (%(default)s)",
        )


def limits_from(args: argparse.Namespace) -> Limits:
    values = {item.name: getattr(args, item.name) for item in fields(Limits)}
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    return Limits(**values)
