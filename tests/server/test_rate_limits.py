"""What one API key may ask: the bucket against arithmetic, the refusal as openai's client sees it."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from conftest import eventually
from fake import FakeLLM
from hypothesis import given
from hypothesis import strategies as st

from quire_server.metrics import Metrics
from quire_server.rate_limits import Bucket, RateLimitMiddleware, duration
from quire_server.state import Settings

LONG = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("alice:alice-key\nbob:bob-s-key rpm=3 concurrent=1\n")
    path.chmod(0o600)
    return path


def header(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@given(st.integers(1, 50), st.lists(st.floats(0, 30), max_size=200))
def test_no_span_of_time_sees_more_than_its_share(size, pauses):
    """From any taken token to any later one: at most a full bucket and what came back in between."""
    bucket, now, taken = Bucket(size, size, 0.0), 0.0, []
    for pause in pauses:
        now += pause
        if bucket.take(size, now):
            taken.append(now)
    for i, begin in enumerate(taken):
        for count, end in enumerate(taken[i:], 1):
            assert count <= size + (end - begin) * size / 60 + 1e-6


def test_bucket_fills_again_and_no_further():
    bucket = Bucket(6, 6, 0.0)
    assert [bucket.take(6, 0.0) for _ in range(7)] == [True] * 6 + [False]
    assert bucket.seconds_to(1) == pytest.approx(10)
    assert not bucket.take(6, 9.9)
    assert bucket.take(6, 10.1)
    assert [bucket.take(6, 10_000.0) for _ in range(7)] == [True] * 6 + [False]
    assert bucket.take(8, 10_000.0), "a limit that was raised counts at once"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.12, "120ms"), (1, "1s"), (8.64, "8.64s"), (60, "1m0s"), (365.5, "6m5.5s")]
)
def test_durations_are_written_as_openai_writes_them(seconds, text):
    assert duration(seconds) == text


def test_requests_a_minute(make_live, file):
    live = make_live(settings=Settings(api_key_file=file, max_requests_per_minute_per_key=5))
    alice, bob = live.openai(api_key="alice-key"), live.openai(api_key="bob-s-key")
    for left in (2, 1, 0):
        raw = bob.completions.with_raw_response.create(model="demo", prompt="x")
        assert raw.headers["x-ratelimit-limit-requests"] == "3"
        assert raw.headers["x-ratelimit-remaining-requests"] == str(left)
        assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
    for stream in (True, False):
        with pytest.raises(openai.RateLimitError) as refused:
            bob.completions.create(model="demo", prompt="x", stream=stream)
    error, answer = refused.value, refused.value.response
    assert (error.code, error.type) == ("rate_limit_exceeded", "rate_limit_error")
    assert 1 <= int(answer.headers["retry-after"]) <= 20
    assert 0 < int(answer.headers["retry-after-ms"]) <= 20_000
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    # Nobody else notices, and probes are not counted.
    assert alice.models.list().data
    for _ in range(10):
        assert httpx.get(f"{live.base}/health").status_code == 200
        text = httpx.get(f"{live.base}/metrics", headers=header("bob-s-key")).text
    assert 'quire:rate_limited_requests_by_key_total{key="bob"} 2.0' in text
    for _ in range(4):
        alice.completions.create(model="demo", prompt="x")
    with pytest.raises(openai.RateLimitError):
        alice.completions.create(model="demo", prompt="x")
    assert not live.engine.running


def test_unknown_keys_take_nothing(make_live, file):
    live = make_live(settings=Settings(api_key_file=file, max_requests_per_minute_per_key=1))
    for _ in range(5):
        assert httpx.get(f"{live.base}/v1/models", headers=header("other")).status_code == 401
    assert live.openai(api_key="alice-key").models.list().data


def test_requests_at_once(make_live, file):
    live = make_live(FakeLLM(delay=0.005), Settings(api_key_file=file, max_concurrent_requests_per_key=2))
    alice, bob = live.openai(api_key="alice-key"), live.openai(api_key="bob-s-key")
    for client, most in ((alice, 2), (bob, 1)):
        streams = [
            client.completions.create(
                model="demo", prompt="x", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in range(most)
        ]
        for stream in streams:
            next(iter(stream))
        with pytest.raises(openai.RateLimitError, match=f"limit is {most} at once") as refused:
            client.completions.create(model="demo", prompt="x")
        assert refused.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()
        assert eventually(lambda: not live.engine.running)
        assert eventually(lambda: live.server.lifecycle.in_flight == 0)
        assert client.completions.create(model="demo", prompt="x").choices


def test_responses_in_the_background_count_as_open(make_live, file):
    """A key of one request at once has one at work: it can look at it and end it, and not begin another."""
    live = make_live(FakeLLM(delay=0.02), Settings(api_key_file=file, max_concurrent_requests_per_key=1))
    alice = live.openai(api_key="alice-key")
    began = alice.responses.create(model="demo", input="x", background=True, extra_body={"ignore_eos": True})
    for begin in (
        lambda: alice.completions.create(model="demo", prompt="x"),
        lambda: alice.responses.create(model="demo", input="x", background=True),
    ):
        with pytest.raises(openai.RateLimitError, match="limit is 1 at once"):
            begin()
    assert alice.responses.retrieve(began.id).status in ("queued", "in_progress")
    assert live.openai(api_key="bob-s-key").completions.create(model="demo", prompt="x").choices
    assert alice.responses.cancel(began.id).status == "cancelled"
    assert alice.completions.create(model="demo", prompt="x").choices


def test_a_client_that_waits_as_told_is_served(make_live, file):
    live = make_live(settings=Settings(api_key_file=file, max_requests_per_minute_per_key=40))
    patient = live.openai(api_key="alice-key", max_retries=5)
    refused = live.server.metrics._limited.labels("alice")._value
    asked = 0
    while not refused.get() and asked < 200:
        assert patient.models.list().data
        asked += 1
    assert refused.get() > 0
    assert asked > 40


def test_nothing_is_kept_of_what_has_ended():
    from quire_server.keys import Key, current_key

    async def app(scope, receive, send):
        if scope["path"] == "/fails":
            raise RuntimeError

    limiter = RateLimitMiddleware(app, Metrics(["demo"]), None, 3, clock=lambda: 0.0)

    async def ask():
        current_key.set(Key("alice", b""))
        for path in ["/v1/models", "/fails"] * 5:
            try:
                await limiter({"type": "http", "method": "POST", "path": path}, None, None)
            except RuntimeError:
                assert path == "/fails"

    asyncio.run(ask())
    assert limiter._running == {}
