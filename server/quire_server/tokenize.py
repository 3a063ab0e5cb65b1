"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.responses import Response

from quire_server.errors import json_response, refuse
from quire_server.openai.base import Strict
from quire_server.openai.chat_schema import ChatFields, Message
from quire_server.openai.fields import TokenIds
from quire_server.routing import StrictRoute
from quire_server.state import Server, server_of

router = APIRouter(tags=["tokens"], route_class=StrictRoute)
State = Annotated[Server, Depends(server_of)]


class TokenizeRequest(ChatFields):
    """A prompt, or the messages of a chat with what its template takes."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)] | None = None  # type: ignore[assignment]
    add_special_tokens: bool | None = None  # type: ignore[assignment]
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: TokenIds


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, server: State) -> Response:
    model = server.model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise refuse("prompt", "prompt: give either prompt or messages")
    if body.prompt is not None:
        for name in ("tools", "documents", "chat_template", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise refuse(name, f"{name}: only allowed together with messages")
        special = body.add_special_tokens is not False
        (tokens,) = await model.text.encode([body.prompt], add_special_tokens=special)
    else:
        body.add_special_tokens = bool(body.add_special_tokens)
        body.check_prompt(server.limits, server.settings.trust_request_chat_template)
        tokens = (await model.text.chat_prompt(body)).token_ids
    answer: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": model.engine.info.max_model_len,
        "tokens": tokens,
        "token_strs": await model.text.tokens(tokens) if body.return_token_strs else None,
    }
    return json_response(answer)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, server: State) -> Response:
    model = server.model(body.model)
    vocab = model.engine.info.vocab_size
    for token in body.tokens:
        if token >= vocab:
            raise refuse("tokens", f"tokens: {token} is not below the vocabulary's size of {vocab}")
    return json_response({"prompt": await model.text.decode(body.tokens, skip_special_tokens=False)})
