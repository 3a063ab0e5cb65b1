"""Clients that are slow, broken or hostile, on raw sockets: none of them keeps anything, and the next one is served."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable

import pytest
from conftest import eventually
from fake import FakeLLM

from quire_server.limits import Limits
from quire_server.network import Network
from quire_server.state import Settings

LONG = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True}


def post(body: dict | bytes, *headers: str, path: str = "/v1/completions") -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    if not any(h.lower().startswith(("transfer-encoding", "content-length")) for h in headers):
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode() + content


class Client:
    """A socket to the server."""

    def __init__(self, port: int, buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", port))

    def send(self, data: bytes) -> Client:
        self.socket.sendall(data)
        return self

    def flood(self, chunk: bytes, total: int) -> None:
        """Send until the server has had enough, or ``total`` bytes were taken: then it has no bound."""
        sent = 0
        try:
            while sent < total:
                sent += self.socket.send(chunk)
        except OSError:
            return
        raise AssertionError(f"{sent} bytes were taken")

    def rest(self) -> bytes:
        """All that still comes until the server closes."""
        answer = b""
        try:
            while piece := self.socket.recv(65536):
                answer += piece
        except ConnectionError:
            pass
        return answer

    def response(self) -> tuple[int, dict]:
        """The answer's status and JSON, when it is the last one of the connection."""
        head, _, body = self.rest().partition(b"\r\n\r\n")
        return int(head.split(b" ")[1]), json.loads(body)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.fixture
def serve(make_live) -> Callable:
    """serve(delay=..., **network) -> (server, client factory). Afterwards nothing may be left of any client."""
    made = []

    def start(delay: float = 0.0, limits: Limits | None = None, **network):
        live = make_live(
            FakeLLM(delay=delay, max_model_len=10**6),
            Settings(network=Network(**network), limits=limits or Limits()),
        )
        made.append(live)
        return live, lambda **options: Client(live.port, **options)

    yield start
    for live in made:
        assert eventually(lambda live=live: not live.engine.running)
        assert eventually(lambda live=live: live.server.lifecycle.in_flight == 0)
        with live.http() as http:
            assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


# -- reading ---------------------------------------------------------------------------------------------------------
def test_a_client_that_stops_reading_is_paused_and_then_cut_off(serve):
    live, client = serve(write_timeout=1.0)
    with client(buffer=4096) as reader:
        reader.send(post({**LONG, "max_tokens": 900_000, "stream": True}))
        assert eventually(lambda: bool(live.engine.running))
        assert eventually(lambda: live.engine.aborted, 30)
        reader.socket.settimeout(5)
        assert b"[DONE]" not in reader.rest()


def test_a_client_that_reads_slowly_is_served(serve):
    """It takes a little well within each time limit, and gets all of it in the end."""
    _, client = serve(write_timeout=2.0)
    with client(buffer=65536) as reader:
        reader.send(post({**LONG, "max_tokens": 3000, "stream": True}, "Connection: close"))
        answer = b""
        for _ in range(25):
            answer += reader.socket.recv(16384)
            time.sleep(0.1)
        answer += reader.rest()
    assert b"data: [DONE]" in answer


def test_an_answer_that_nobody_reads_is_dropped(serve):
    """One that comes as a whole: it is larger than what the system takes, and there is nobody to wait for it."""
    live, client = serve(write_timeout=0.5)
    with client(buffer=4096) as reader:
        reader.send(post({**LONG, "max_tokens": 3000, "n": 4, "logprobs": 3}))
        assert eventually(lambda: _connections(live) == 1)
        assert eventually(lambda: _connections(live) == 0, 30)


def _connections(live) -> int:
    """Connections that the server has, without making one."""
    import psutil

    return sum(
        c.status == psutil.CONN_ESTABLISHED and c.laddr.port == live.port
        for c in psutil.Process().net_connections("tcp")
        if c.laddr
    )


def test_half_closed_is_gone(serve):
    """Who ends its side has left: HTTP cannot tell it from a client that vanished."""
    live, client = serve(delay=0.01)
    with client() as half:
        half.send(post({**LONG, "stream": True}))
        assert half.socket.recv(10)
        half.socket.shutdown(socket.SHUT_WR)
        assert eventually(lambda: live.engine.aborted)


def test_reset_while_streaming(serve):
    live, client = serve(delay=0.01)
    for _ in range(20):
        with client() as one:
            one.send(post({**LONG, "stream": True}))
            assert one.socket.recv(10)
            one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert eventually(lambda: len(live.engine.aborted) == 20)


# -- writing ---------------------------------------------------------------------------------------------------------
def test_upload_that_is_aborted(serve):
    live, client = serve()
    for part in (1, 40, 1000):
        with client() as one:
            one.send(post(b" " * part, "Content-Length: 5000"))
            assert eventually(lambda: live.server.lifecycle.in_flight == 1)
        assert eventually(lambda: live.server.lifecycle.in_flight == 0)
    assert not live.engine.opened


def test_body_in_drops(serve):
    live, client = serve(limits=Limits(body_timeout=0.5))
    with client() as one:
        one.send(post(b"", "Content-Length: 5000"))
        _drip(one, b" ", 0.05)
        assert one.response()[0] == 408
    assert not live.engine.opened


def test_headers_in_drops(serve):
    _, client = serve(header_timeout=0.5)
    with client() as one:
        one.send(b"GET /ping HTTP/1.1\r\n")
        _drip(one, b"X: y\r\n", 0.05)
        status, body = one.response()
    assert status == 408
    assert "--header-timeout" in body["error"]["message"]


def _drip(one: Client, drop: bytes, pause: float) -> None:
    """Send drops until the answer comes."""
    deadline = time.monotonic() + 15
    one.socket.settimeout(pause)
    while time.monotonic() < deadline:
        try:
            one.send(drop)
            if one.socket.recv(1, socket.MSG_PEEK):
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    else:
        raise AssertionError("the server takes drops for ever")
    one.socket.settimeout(10)


def test_connections_that_ask_nothing_are_closed(serve):
    _, client = serve(header_timeout=0.3, timeout_keep_alive=1)
    with client() as mute:
        assert mute.rest() == b""
    with client() as kept:
        kept.send(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = kept.rest()  # it is closed after the time for keeping it
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"HTTP/1.1") == 1
    with client() as again:
        again.send(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert eventually(lambda: b"alive" in again.socket.recv(65536))
        again.send(b"G")  # the time for the next headers begins with their first byte
        assert again.response()[0] == 408


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /ping HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 5000 + b"\r\n\r\n",
        b"GET /ping HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(500)) + b"\r\n",
    ],
    ids=["line", "header", "headers"],
)
def test_headers_over_the_limit(serve, head):
    _, client = serve(max_header_bytes=4000)
    for size in (len(head), 1000):
        with client() as one:
            for start in range(0, len(head), size):
                one.send(head[start : start + size])
                time.sleep(0.01)
            status, body = one.response()
        assert status == 431
        assert "--max-header-bytes" in body["error"]["message"]


@pytest.mark.parametrize(
    ("begin", "chunk"),
    [
        (b"GET /", b"x" * 65536),
        (b"GET /ping HTTP/1.1\r\nX: ", b"y" * 65536),
        (b"GET /ping HTTP/1.1\r\n", b"X: y\r\n" * 10_000),
        (b"", b"\r\n" * 30_000),
        (post(b"1;", "Transfer-Encoding: chunked"), b"e" * 65536),
        (post(b"1\r\n{\r\n0\r\nX: ", "Transfer-Encoding: chunked"), b"y" * 65536),
        (post(b"1\r\n{\r\n0\r\n", "Transfer-Encoding: chunked"), b"X: y\r\n" * 10_000),
        (post({**LONG, "stream": True}), b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n" * 1000),
        (post({**LONG, "stream": True}), post(b"x" * 60_000)),
    ],
    ids=["line", "header", "headers", "blank", "extension", "trailer", "trailers", "pipelined", "pipelined bodies"],
)
def test_what_never_ends_is_ended(serve, begin, chunk):
    _, client = serve(delay=0.001)
    with client() as one:
        one.send(begin)
        one.flood(chunk, 100 * 2**20)


def test_trailers_are_no_headers(serve, make_live):
    live = make_live(settings=Settings(api_keys=("secret-key",)))
    with Client(live.port) as one:
        body = b'e\r\n{"prompt":"x"}\r\n0\r\nAuthorization: Bearer secret-key\r\n\r\n'
        one.send(post(body, "Transfer-Encoding: chunked", "Connection: close"))
        assert one.response()[0] == 401
    assert not live.engine.opened


# -- several requests ------------------------------------------------------------------------------------------------
def test_pipelined_requests_end_with_the_first_answer(serve):
    live, client = serve()
    with client() as one:
        one.send(post({"prompt": "x", "max_tokens": 4}) + b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        answer = one.rest()
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b'"text_completion"' in answer
    assert len(live.engine.opened) == 1


def test_what_is_pipelined_hides_no_departure(serve):
    """uvicorn would stop reading, and so not see that the client has gone."""
    live, client = serve(delay=0.01)
    for stream in (True, False):
        with client() as one:
            one.send(post({**LONG, "stream": stream}) + b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
            assert eventually(lambda: len(live.engine.running) == 1)
        assert eventually(lambda: not live.engine.running)


@pytest.mark.parametrize(
    "garbage",
    [b"\x00\xff garbage\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
)
def test_garbage(serve, garbage):
    live, client = serve(delay=0.01)
    with client() as one:
        one.send(garbage)
        status, body = one.response()
        assert (status, body["error"]["type"]) == (400, "invalid_request_error")
    with client() as one:  # behind a request that is being answered
        one.send(post({**LONG, "stream": True}) + garbage)
        assert eventually(lambda: live.engine.opened)
        one.rest()


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: -1",),
        ("Content-Length: 5x",),
        ("Transfer-Encoding: chunked, identity",),
        ("Content-Length : 5",),
    ],
    ids=str,
)
def test_two_lengths_are_none(serve, headers):
    """What a proxy and this server could read differently is not read at all (request smuggling)."""
    live, client = serve(limits=Limits(body_timeout=1.0))
    with client() as one:
        one.send(post(b"0\r\n\r\nGET /ping HTTP/1.1\r\nHost: x\r\n\r\n", *headers))
        answer = one.rest()
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 408"))
    assert not live.engine.opened


def test_offers_of_another_protocol_are_passed_over(serve):
    """Java's client offers HTTP/2 with each first request, its body in the same packet."""
    live, client = serve()
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk")
    with client() as one:
        for _ in range(2):
            one.send(post({"prompt": "x", "max_tokens": 4}, *offer))
            answer = http.client.HTTPResponse(one.socket)
            answer.begin()
            assert (answer.status, json.loads(answer.read())["object"]) == (200, "text_completion")
    assert len(live.engine.opened) == 2


def test_no_proxy(serve):
    _, client = serve()
    with client() as one:
        one.send(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n")
        assert one.response()[0] == 405
    with client() as one:  # a target in full names a route here, as HTTP asks
        one.send(b"GET http://example.org/ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert one.response() == (200, {"status": "alive"})


# -- many ------------------------------------------------------------------------------------------------------------
def test_connections_over_the_limit_are_told_so(serve):
    live, client = serve(max_connections=3, header_timeout=60)
    first = [client() for _ in range(3)]
    try:
        assert eventually(lambda: _connections(live) == 3)
        with client() as one:
            status, body = one.response()
        assert status == 503
        assert "--max-connections" in body["error"]["message"]
        first[0].send(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert first[0].response()[0] == 200
    finally:
        for one in first:
            one.socket.close()
    assert eventually(lambda: _connections(live) == 0)


def test_two_hundred_that_leave_at_all_times(serve):
    live, client = serve(delay=0.002)

    def leave(number: int) -> None:
        request = post({**LONG, "stream": number % 2 == 0, "n": 1 + number % 3})
        with client() as one:
            one.send(request[: len(request) if number % 5 else len(request) // 2])
            if number % 6 == 0 and number % 5:
                one.socket.recv(100)
            time.sleep(number % 7 * 0.005)

    threads = [threading.Thread(target=lambda k=k: [leave(i) for i in range(k, 200, 8)]) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(live.engine.opened) > 50
    assert eventually(lambda: len(live.engine.aborted) == len(live.engine.opened))
