"""schemathesis on the server's own OpenAPI document: no 500, no hang, and an engine that is alive and idle afterwards."""

from __future__ import annotations

import jsonschema
import pytest
from conftest import Live, eventually
from fake import FakeLLM
from fuzz import MODES, UNENDING, alive, fuzz, operations

from quire_server.app import create_app
from quire_server.state import Server, Settings

DOCUMENT = create_app(Server([FakeLLM()])).openapi()
LABELS = sorted(
    f"{method.upper()} {path}" for path, item in DOCUMENT["paths"].items() for method in item if path not in UNENDING
)


@pytest.fixture(scope="module")
def served():
    live = Live(FakeLLM(), Settings(access_log=False))
    yield live, {operation.label: operation for operation in operations(live.base)}
    live.close()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", LABELS)
def test_no_request_harms(served, label, mode):
    live, found = served
    assert set(found) == set(LABELS)
    many = 1 if label.startswith("GET") and "{" not in label else 5 if label.startswith("GET") else 20
    statuses = fuzz(found[label], mode, max_examples=many, derandomize=True)
    if mode is MODES[0] and "{" not in label:
        assert statuses, "nothing was sent"
    assert eventually(lambda: not live.engine.running)
    assert alive(live.base)


def test_the_document():
    """What FastAPI says of its own errors is gone; bodies, errors and streams are described."""
    assert "422" not in str(DOCUMENT["paths"])
    chat = DOCUMENT["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            assert operation["responses"]["default"], path
            if method == "post" and path.startswith(("/v1/c", "/tok", "/detok")):
                (reference,) = operation["requestBody"]["content"]["application/json"]["schema"].values()
                assert DOCUMENT["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert "securitySchemes" not in DOCUMENT["components"]
    guarded = create_app(Server([FakeLLM()], Settings(api_keys=("secret",)))).openapi()
    assert guarded["security"]
    assert "secret" not in str(guarded["components"])
