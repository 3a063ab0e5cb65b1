"""One connection: uvicorn's, with bounds that it has not.

Until the headers of a request are complete, its bytes and its time are bounded; so are the connections there are, and
the time for which a client takes nothing of its answer. What comes before an answer is complete (pipelining) is not
read as a request: it would wait in memory, and stop uvicorn from seeing that the client has gone. The connection then
ends with the answer, which HTTP allows and clients that pipeline must expect.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from quire_server.errors import ApiError
from quire_server.network import Network

UNSENT = 16 * 1024
"""Bytes that the system takes of an answer beyond what is on its way: what a slow client leaves waits here, not there."""
_OFFER = (b"upgrade", b"connection", b"http2-settings")
_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", None)


class Connection(HttpToolsProtocol):
    network = Network()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending = 0  # bytes since something was complete: the headers, or a part of a body
        self._head = 0  # bytes of this request's line and headers
        self._in_head = True
        self._closing = False  # nothing more is read from it
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # -- the connection --------------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.network.max_connections:
            self._refuse(503, f"{self.network.max_connections} connections are open already (--max-connections)")
            return
        sock = transport.get_extra_info("socket")
        if _LOWAT is not None and sock is not None:
            with contextlib.suppress(OSError):  # a socket of another kind
                sock.setsockopt(socket.IPPROTO_TCP, _LOWAT, UNSENT)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        self._stop_write_timer()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        self._pending += len(data)
        if not self._closing:
            if self._head_timer is None and not self._answering:
                self._expect_head()
            self._unset_keepalive_if_required()
            self._feed(data)
        if self._pending > self.network.max_header_bytes and not self.transport.is_closing():
            self._too_large()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            method = self.parser.get_method()
            if method == b"CONNECT":
                self._refuse(405, "CONNECT: this server is no proxy")
                return
            # The parser gives up on the body of a request that offers another protocol, as Java's client does with
            # HTTP/2. Without the offer it is an ordinary request.
            head = [method + b" " + self.url + b" HTTP/1.1\r\n"]
            head += [b"%s: %s\r\n" % h for h in self.headers if h[0] not in _OFFER]
            self.parser = httptools.HttpRequestParser(self)
            self._feed(b"".join(head) + b"\r\n" + data[offer.args[0] :])
        except httptools.HttpParserError:
            self._refuse(400, "this is not valid HTTP")

    # -- the parser ------------------------------------------------------------------------------------------------
    def on_message_begin(self) -> None:
        if self._answering:
            self._closing = True
            self.cycle.keep_alive = False
        if not self._closing:
            self._head, self._in_head = 0, True
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._closing:
            self._head += len(url)
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head += len(name) + len(value) + 4
        # What comes behind a body in chunks must not pass for a header.
        if self._in_head and not self._closing and self._head <= self.network.max_header_bytes:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._closing or self.parser.should_upgrade():
            return
        self._pending, self._in_head = 0, False
        self._head_arrived()
        if self._head > self.network.max_header_bytes:
            self._too_large()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._closing:
            self._pending = 0
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._closing and not self.parser.should_upgrade():
            self._pending = 0
            super().on_message_complete()

    # -- what is refused -------------------------------------------------------------------------------------------
    def _too_large(self) -> None:
        limit = self.network.max_header_bytes
        self._refuse(431, f"the request's line and headers have more than {limit} bytes (--max-header-bytes)")

    def _refuse(self, status: int, message: str) -> None:
        """Answer and close; where an answer has begun there is only the closing."""
        self._closing = True
        self._head_arrived()
        if self._answering:
            self.transport.abort()
            return
        response = ApiError(status, message, headers={"Connection": "close"}).response()
        lines = [b"HTTP/1.1 %d \r\n" % status, *(b"%s: %s\r\n" % header for header in response.raw_headers), b"\r\n"]
        self.transport.write(b"".join(lines) + bytes(response.body))
        self.transport.close()

    # -- time ------------------------------------------------------------------------------------------------------
    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.network.header_timeout, self._head_late)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if not self._pending:
            self.transport.close()  # it asked for nothing
            return
        seconds = self.network.header_timeout
        self._refuse(408, f"the request's headers did not arrive within {seconds:g} s (--header-timeout)")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _watch_writing(self, waiting: int) -> None:
        self._write_timer = self.loop.call_later(self.network.write_timeout, self._write_late, waiting)

    def _write_late(self, before: int) -> None:
        waiting = self.transport.get_write_buffer_size()
        if waiting < before:  # slow, but there
            self._watch_writing(waiting)
        else:
            self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def connection_for(network: Network) -> type[Connection]:
    """The protocol of a server with these bounds."""
    return type("Connection", (Connection,), {"network": network})
