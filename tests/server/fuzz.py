"""Requests that nobody would write, made by schemathesis of the server's own document and by hypothesis of its models.

    python tests/server/fuzz.py [--minutes 5] [--url http://127.0.0.1:8000] [--seed N]

starts the demo server (or takes the one at --url) and goes round all routes until the time is over. An answer of 500 or
more, a status that the document does not know, an error that is not in OpenAI's shape, or a server that has nothing to
say afterwards is a failure; what was sent is printed, and the status is 1. The tests run a small part of the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter

import httpx
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode

UNENDING = {"/engine/stream"}  # events until the client goes
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)


def operations(base: str) -> list:
    """Every operation of the document at ``base``, found anew: a new route needs no word here."""
    found = [result.ok() for result in schemathesis.openapi.from_url(f"{base}/openapi.json").get_all_operations()]
    return [operation for operation in found if operation.path not in UNENDING]


def fuzz(operation, mode: GenerationMode, timeout: float = 30.0, **options) -> Counter[int]:
    """Send cases of one operation; how often each status came. ``options`` are hypothesis's settings."""
    statuses: Counter[int] = Counter()
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
        return statuses

    @settings(**{**QUIET, **options})
    @given(operation.as_strategy(generation_mode=mode))
    def send(case):
        response = case.call(timeout=timeout)
        statuses[response.status_code] += 1
        check(response.status_code, response.text)

    send()
    return statuses


def check(status: int, text: str) -> None:
    """200, or a refusal in OpenAI's shape, or in Anthropic's."""
    assert status < 500, (status, text[:500])
    assert status != 422, text[:500]
    if status >= 400:
        body = json.loads(text)
        fields = {"message", "type"} if body.get("type") == "error" else {"message", "type", "param", "code"}
        assert set(body["error"]) == fields, text[:500]


def alive(base: str) -> bool:
    return httpx.get(f"{base}/health", timeout=30).status_code == 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--url")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    from demo_server import DemoServer
    from test_fuzz import ROUTES, bodies

    own = None if arguments.url else DemoServer("--disable-access-log")
    base = (arguments.url or own.base).rstrip("/")
    end, number, failures = time.monotonic() + 60 * arguments.minutes, arguments.seed, 0
    totals: dict[str, Counter[int]] = {}

    def attempt(label: str, run) -> None:
        nonlocal failures
        try:
            totals.setdefault(label, Counter()).update(run())
            assert alive(base), "the server is not healthy afterwards"
        except Exception as error:
            failures += 1
            print(f"FAILED with seed {number}: {label}: {error}", flush=True)
            for note in getattr(error, "__notes__", ()):
                print(note[:4000])

    def by_model(route: str):
        statuses: Counter[int] = Counter()

        @seed(number)
        @settings(**QUIET, max_examples=60)
        @given(bodies(*ROUTES[route]))
        def post(body):
            headers = {"Content-Type": "application/json"}
            response = httpx.post(base + route, content=json.dumps(body).encode(), headers=headers, timeout=60)
            statuses[response.status_code] += 1
            check(response.status_code, response.text)

        post()
        return statuses

    while time.monotonic() < end:
        for route in ROUTES:
            attempt(f"model of {route}", lambda route=route: by_model(route))
        for operation in operations(base):
            for mode in MODES:
                if time.monotonic() < end:
                    attempt(
                        f"{operation.label} {mode.value}", lambda o=operation, m=mode: fuzz(o, m, 60, max_examples=30)
                    )
        number += 1
    for label, counts in sorted(totals.items()):
        print(f"{label}: {dict(counts)}")
    if own is not None:
        assert own.close() == 0, own.log
    print(f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
