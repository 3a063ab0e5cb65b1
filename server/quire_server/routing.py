"""How a request's body becomes its model: strictly, bounded in depth, and off the event loop when it is long."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from quire_server.errors import ApiError, from_validation
from quire_server.limits import Limits, excess
from quire_server.openai.base import Strict


class StrictRequest(Request):
    model: type[Strict]

    async def json(self) -> Any:
        """The body as its model, which FastAPI then takes as it is. Raises ApiError.

        Millions of small parts take seconds to look at, however few of them a limit would allow.
        """
        body, server = await self.body(), self.app.state.server
        return await server.run(len(body), lambda: _parse(self.model, body, server.limits))


def _parse(model: type[Strict], body: bytes, limits: Limits) -> Strict:
    """Refuses NaN, lone surrogates and deep nesting too, each of which Python's own parser lets through or dies of."""
    too_much = excess(body, limits)
    if too_much:
        raise ApiError(413, f"the body has more {too_much}", code="too_many_values")
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    try:
        parsed = model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise from_validation([{**each, "loc": ("body", *each["loc"])} for each in found]) from None
    parsed._size = len(body)
    return parsed


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        model = self.body_field.field_info.annotation if self.body_field is not None else None

        async def strict(request: Request) -> Response:
            if not (isinstance(model, type) and issubclass(model, Strict)):
                return await handler(request)
            parsing = StrictRequest(request.scope, request.receive)
            parsing.model = model
            return await handler(parsing)

        return strict
