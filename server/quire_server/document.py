"""The OpenAPI document: FastAPI's, with the errors and the streams that this server really answers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from quire_server.anthropic.shape import PREFIX

ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field at fault."},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
ANTHROPIC_ERROR = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        },
        "request_id": {"type": ["string", "null"]},
    },
    "required": ["type", "error", "request_id"],
}
EVENTS = {"schema": {"type": "string"}}


def install(app: FastAPI, keys: bool) -> None:
    """Correct ``/openapi.json``. ``keys``: whether the server asks for one."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = corrected(made(), keys)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def corrected(document: dict[str, Any], keys: bool) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own 422, which this server never answers
        schemas.pop(name, None)
    schemas["Error"], schemas["AnthropicError"] = ERROR, ANTHROPIC_ERROR
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    for path, operations in document.get("paths", {}).items():
        shape = "AnthropicError" if path.startswith(PREFIX) else "Error"
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop("422", None)
            error = {"$ref": f"#/components/schemas/{shape}"}
            responses["default"] = {"description": "An error", "content": {"application/json": {"schema": error}}}
            if "stream" in _fields(operation, schemas):
                responses["200"].setdefault("content", {})["text/event-stream"] = EVENTS
    return document


def _fields(operation: dict[str, Any], schemas: dict[str, Any]) -> set[str]:
    """Of the operation's body, when that is one JSON object."""
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    return set(schemas.get(schema.get("$ref", "").rpartition("/")[2], {}).get("properties", ()))
