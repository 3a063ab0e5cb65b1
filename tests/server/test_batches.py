"""Files and batches as OpenAI's client uses them, and what is left of them when the server dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time

import openai
import pytest
from conftest import eventually
from demo_server import DemoServer
from fake import FakeLLM
from fastapi import FastAPI, Request

import quire_server.app
from quire.errors import ConfigError
from quire_server.batch_calls import PRIORITY, Caller, Room
from quire_server.batch_lines import Input, parse
from quire_server.batch_settings import BatchSettings
from quire_server.batch_store import Store
from quire_server.limits import Limits
from quire_server.openai.files import UPLOADS_AT_ONCE
from quire_server.run_batch import RunBatchError, run_batch
from quire_server.state import Server, Settings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDED = {"completed", "failed", "expired", "cancelled"}


def line(custom_id, url=COMPLETIONS, **body):
    given = {"prompt": custom_id} if url == COMPLETIONS else {"messages": [{"role": "user", "content": custom_id}]}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "demo", **given, **body}}


def jsonl(*lines) -> bytes:
    return b"".join(each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in lines)


def begin(client, *lines, endpoint=COMPLETIONS, **options):
    file = client.files.create(file=("input.jsonl", jsonl(*lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options)


def end(client, batch, seconds=20.0):
    """The batch when it has ended."""
    assert eventually(lambda: client.batches.retrieve(batch.id).status in ENDED, seconds)
    return client.batches.retrieve(batch.id)


def read(client, file_id) -> list[dict]:
    return [json.loads(each) for each in client.files.content(file_id).text.splitlines()] if file_id else []


def batches(**options) -> Settings:
    return Settings(batches=BatchSettings(**options))


class TestFiles:
    def test_upload_look_read_and_delete(self, make_live):
        client = make_live().openai()
        content = jsonl(line("a"), line("ü"))
        file = client.files.create(file=("../../etc/päss\nwd", content), purpose="batch")
        assert (file.object, file.bytes, file.purpose, file.status) == ("file", len(content), "batch", "processed")
        assert client.files.retrieve(file.id) == file
        assert client.files.content(file.id).read() == content
        deleted = client.files.delete(file.id)
        assert (deleted.id, deleted.deleted) == (file.id, True)
        for ask in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(file.id)

    def test_lists_are_paged_in_either_order(self, make_live):
        client = make_live().openai()
        made = [client.files.create(file=(f"{i}", b"{}"), purpose="batch").id for i in range(5)]
        assert [file.id for file in client.files.list()] == made[::-1]
        assert [file.id for file in client.files.list(limit=2, order="asc")] == made  # the client asks for all pages
        first = client.files.list(limit=2)
        assert ([file.id for file in first.data], first.has_more) == ([made[4], made[3]], True)
        rest = client.files.list(limit=3, after=made[3])
        assert ([file.id for file in rest.data], rest.has_more) == ([made[2], made[1], made[0]], False)
        assert not client.files.list(purpose="batch_output").data
        with pytest.raises(openai.NotFoundError, match="after"):
            raise_with_param(lambda: client.files.list(after="file-x"))

    def test_expire_when_asked_to(self, make_live, monkeypatch):
        client = make_live().openai()
        file = client.files.create(
            file=("a", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert file.expires_at == file.created_at + 3600
        now = time.time()
        monkeypatch.setattr("quire_server.file_store.time.time", lambda: now + 3601)
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
        assert client.files.list().data == []

    @pytest.mark.parametrize(
        ("form", "param"),
        [
            ({"purpose": "assistants"}, "purpose"),
            ({"purpose": "fine-tune"}, "purpose"),
            ({}, "purpose"),
            ({"purpose": "batch", "extra": "1"}, "extra"),
            ({"purpose": "batch", "expires_after[seconds]": "4000"}, "expires_after[anchor]"),
            (
                {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "59"},
                "expires_after[seconds]",
            ),
        ],
    )
    def test_wrong_uploads(self, http, form, param):
        refused = http.post("/v1/files", data=form, files={"file": ("a", b"{}")})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param

    def test_bodies_that_are_no_upload(self, http):
        assert http.post("/v1/files", json={"purpose": "batch"}).status_code == 415
        assert http.post("/v1/files", data={"purpose": "batch"}, files={"other": b""}).status_code == 400
        broken = {"Content-Type": "multipart/form-data; boundary=x"}
        assert http.post("/v1/files", content=b"no form", headers=broken).status_code == 400
        assert http.post("/v1/files", content=b"", headers={"Content-Type": "multipart/form-data"}).status_code == 400
        empty = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", b"")})
        assert empty.json()["error"]["param"] == "file"

    def test_unknown_query_is_refused_by_name(self, http):
        refused = http.get("/v1/files?colour=red")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "colour")
        assert http.get("/v1/batches?limit=101").json()["error"]["param"] == "limit"

    def test_upload_has_its_own_limits(self, make_live):
        """A large upload passes where a large request does not, up to --max-file-bytes exactly."""
        settings = Settings(limits=Limits(max_body_bytes=5000), batches=BatchSettings(max_file_bytes=300_000))
        live = make_live(settings=settings)
        client = live.openai()
        assert client.files.create(file=("a", b"x" * 300_000), purpose="batch").bytes == 300_000
        for size in (300_001, 900_000):
            with pytest.raises(openai.APIStatusError, match="--max-file-bytes") as refused:
                client.files.create(file=("a", b"x" * size), purpose="batch")
            assert refused.value.status_code == 413
        with live.http() as http:
            chunks = (b"x" * 10_000 for _ in range(100))  # of a length that is not told before
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            assert http.post("/v1/files", content=chunks, headers=headers).status_code in (400, 413)
            assert http.post(COMPLETIONS, content=b"x" * 6000).status_code == 413

    def test_upload_that_stalls(self, make_live):
        live = make_live(settings=batches(upload_timeout=0.2))
        head = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        with socket.create_connection(("127.0.0.1", live.port), timeout=20) as connection:
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n--x\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_what_is_spooled_is_bounded_and_goes_with_its_upload(self, make_live, monkeypatch, tmp_path):
        """However an upload ends: whole, too long, or with its client gone."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        live = make_live(settings=batches(max_file_bytes=5 * 2**20))

        def spooled() -> list[int]:
            """Sizes of the files without a name that this process has open in the temporary folder."""
            found = []
            for number in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/self/fd/{number}").startswith(f"{tmp_path}/#"):
                        found.append(os.fstat(int(number)).st_size)
            return found

        form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        head = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        with contextlib.ExitStack() as open_ones:
            for _ in range(UPLOADS_AT_ONCE):
                one = socket.create_connection(("127.0.0.1", live.port), timeout=20)
                open_ones.enter_context(one)
                one.sendall(head + b"Content-Length: 5000000\r\n\r\n" + form + b"x" * 3 * 2**20)
            assert eventually(lambda: len(spooled()) == UPLOADS_AT_ONCE and min(spooled()) >= 2**20, 20)
            one_more = {"purpose": (None, b"batch"), "file": ("a", b"x" * 2 * 2**20)}
            with live.http() as http:
                assert http.post("/v1/files", files=one_more).status_code == 429
        assert eventually(lambda: not spooled() and live.server.lifecycle.in_flight == 0, 20)
        with live.http() as http:
            assert http.post("/v1/files", files=one_more).status_code == 200
            assert http.post("/v1/files", files={**one_more, "file": ("a", b"x" * 6 * 2**20)}).status_code == 413
            chunks = itertools.chain([form], (b"x" * 2**16 for _ in range(200)))  # of a length that is not told before
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            assert http.post("/v1/files", content=chunks, headers=headers).status_code == 413
        assert eventually(lambda: not spooled())

    def test_number_and_total_are_bounded(self, make_live):
        client = make_live(settings=batches(max_files=2)).openai()
        kept = [client.files.create(file=("a", b"{}"), purpose="batch") for _ in range(2)]
        with pytest.raises(openai.APIStatusError, match="--max-files") as refused:
            client.files.create(file=("a", b"{}"), purpose="batch")
        assert refused.value.status_code == 507
        client.files.delete(kept[0].id)
        client.files.create(file=("a", b"{}"), purpose="batch")
        client = make_live(settings=batches(max_total_file_bytes=1000)).openai()
        client.files.create(file=("a", b"x" * 200), purpose="batch")
        with pytest.raises(openai.APIStatusError, match="--max-total-file-bytes"):
            client.files.create(file=("a", b"x" * 801), purpose="batch")


def raise_with_param(ask):
    """Name the parameter at fault in the error's text."""
    try:
        ask()
    except openai.APIStatusError as error:
        error.args = (f"{error.param}: {error}",)
        raise


class TestBatches:
    def test_from_upload_to_output(self, make_live):
        live = make_live()
        client = live.openai()
        lines = [line(f"request {i}", seed=i, max_tokens=10 + i, n=1 + i % 2) for i in range(20)]
        lines[7]["body"]["model"] = "other"
        lines[9]["body"] |= {"stream": True}
        lines[11]["body"] |= {"colour": "red"}
        batch = begin(client, *lines, metadata={"for": "a test"})
        assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"for": "a test"})
        assert batch.expires_at == batch.created_at + 86400
        ended = end(client, batch)
        assert (ended.status, ended.errors, ended.metadata) == ("completed", None, {"for": "a test"})
        counts = ended.request_counts
        assert (counts.total, counts.completed, counts.failed) == (20, 17, 3)
        assert ended.created_at <= ended.in_progress_at <= ended.finalizing_at <= ended.completed_at
        good, bad = read(client, ended.output_file_id), read(client, ended.error_file_id)
        assert [each["custom_id"] for each in good] == [f"request {i}" for i in range(20) if i not in (7, 9, 11)]
        for each in good:
            sent = next(one for one in lines if one["custom_id"] == each["custom_id"])
            live_answer = client.completions.create(**sent["body"])
            answer = openai.types.Completion.model_validate(each["response"]["body"])
            assert answer.choices == live_answer.choices
            assert each["response"]["status_code"] == 200
            assert each["error"] is None
        refused = {each["custom_id"]: each["response"] for each in bad}
        assert {id: (one["status_code"], one["body"]["error"]["param"]) for id, one in refused.items()} == {
            "request 7": (404, "model"),
            "request 9": (400, "stream"),
            "request 11": (400, "colour"),
        }
        assert len({each["id"] for each in good + bad}) == 20
        file = client.files.retrieve(ended.output_file_id)
        assert (file.purpose, file.bytes) == ("batch_output", len(client.files.content(file.id).read()))

    def test_chat(self, make_live):
        client = make_live().openai()
        ended = end(client, begin(client, line("hello", CHAT, seed=1), endpoint=CHAT))
        (answer,) = read(client, ended.output_file_id)
        expected = client.chat.completions.create(**line("hello", CHAT, seed=1)["body"])
        assert answer["response"]["body"]["choices"][0]["message"]["content"] == expected.choices[0].message.content
        assert ended.error_file_id is None

    @pytest.mark.parametrize(
        ("raw", "code", "param"),
        [
            (b"{no json}\n", "invalid_json_line", None),
            (b'{"custom_id": NaN}\n', "invalid_json_line", None),
            (b"[]\n", "invalid_json_line", None),
            (b"[" * 5000 + b"\n", "invalid_json_line", None),
            (b"1" * 4301 + b"\n", "invalid_json_line", None),
            (b"\xff\n", "invalid_json_line", None),
            (
                jsonl({k: v for k, v in line("c").items() if k != "custom_id"}),
                "missing_required_parameter",
                "custom_id",
            ),
            (jsonl({k: v for k, v in line("c").items() if k != "body"}), "missing_required_parameter", "body"),
            (jsonl(line("a")), "duplicate_custom_id", "custom_id"),
            (jsonl({**line("c"), "custom_id": 3}), "invalid_custom_id", "custom_id"),
            (jsonl({**line("c"), "method": "GET"}), "invalid_method", "method"),
            (jsonl(line("c", CHAT)), "invalid_url", "url"),
            (jsonl({**line("c"), "url": "/v1/files"}), "invalid_url", "url"),
            (jsonl({**line("c"), "body": []}), "invalid_type", "body"),
            (jsonl({**line("c"), "colour": "red"}), "unknown_parameter", "colour"),
            (jsonl(line("c", suffix="x" * 10_000)), "line_too_long", None),
        ],
    )
    def test_wrong_lines(self, make_live, raw, code, param):
        """Nothing is run unless every line is right; the error names the line."""
        live = make_live(settings=Settings(limits=Limits(max_body_bytes=9000)))
        client = live.openai()
        ended = end(client, begin(client, line("a"), b"  \n", line("b"), raw, line("d")))
        assert ended.status == "failed"
        (error,) = ended.errors.data
        assert (error.code, error.line, error.param) == (code, 4, param)
        assert (ended.output_file_id, ended.error_file_id, live.engine.opened) == (None, None, [])

    def test_all_wrong_lines_are_told_up_to_a_bound(self, make_live):
        client = make_live().openai()
        ended = end(client, begin(client, *[b"x\n"] * 150))
        assert [error.line for error in ended.errors.data] == list(range(1, 101))

    def test_input_as_a_whole(self, make_live):
        client = make_live(settings=batches(max_batch_lines=3)).openai()
        assert end(client, begin(client, b"\n\n")).errors.data[0].code == "empty_file"
        assert end(client, begin(client, *map(line, "abcd"))).errors.data[0].code == "too_many_requests"
        assert end(client, begin(client, *map(line, "abc"))).status == "completed"

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"endpoint": "/v1/embeddings"}, "endpoint"),
            ({"endpoint": "/tokenize"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"metadata": {"x": 1}}, "metadata.x"),
            ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
            ({"colour": "red"}, "colour"),
        ],
    )
    def test_wrong_batches(self, http, client, changes, param):
        file = client.files.create(file=("a", jsonl(line("a"))), purpose="batch")
        body = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h", **changes}
        refused = http.post("/v1/batches", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)

    def test_input_that_is_not_there(self, client):
        with pytest.raises(openai.NotFoundError):
            client.batches.create(input_file_id="file-x", endpoint=COMPLETIONS, completion_window="24h")
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve("batch_x")

    def test_list(self, make_live):
        client = make_live().openai()
        made = [begin(client, line("a")).id for _ in range(3)]
        assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]
        first = client.batches.list(limit=2)
        assert ([batch.id for batch in first.data], first.has_more) == (made[:0:-1], True)

    def test_oldest_that_has_ended_is_forgotten(self, make_live):
        live = make_live(FakeLLM(delay=0.01), batches(max_batches=2))
        client = live.openai()
        done = end(client, begin(client, line("a", max_tokens=1)))
        endless = [begin(client, line("a", max_tokens=4000, ignore_eos=True)) for _ in range(2)]
        assert {batch.id for batch in client.batches.list()} == {batch.id for batch in endless}
        assert read(client, done.output_file_id)
        with pytest.raises(openai.RateLimitError, match="--max-batches"):
            begin(client, line("a"))

    def test_cancel_keeps_what_is_answered(self, make_live):
        live = make_live(FakeLLM(delay=0.005), batches(concurrency=2))
        client = live.openai()
        lines = [line(f"{i}", max_tokens=10) for i in range(4)]
        lines += [line(f"long {i}", max_tokens=4000, ignore_eos=True) for i in range(50)]
        batch = begin(client, *lines)
        assert eventually(lambda: client.batches.retrieve(batch.id).request_counts.completed == 4, 20)
        assert eventually(lambda: len(live.engine.running) == 2)
        with pytest.raises(openai.ConflictError):
            client.files.delete(batch.input_file_id)
        assert client.batches.cancel(batch.id).status == "cancelling"
        ended = end(client, batch)
        assert (ended.status, ended.request_counts.total, ended.request_counts.completed) == ("cancelled", 54, 4)
        assert ended.cancelling_at <= ended.cancelled_at
        assert [each["custom_id"] for each in read(client, ended.output_file_id)] == ["0", "1", "2", "3"]
        assert eventually(lambda: not live.engine.running)
        assert len(live.engine.opened) == 6
        with pytest.raises(openai.ConflictError, match="cancelled"):
            client.batches.cancel(batch.id)
        client.files.delete(batch.input_file_id)
        again = end(client, begin(client, *[line(f"{i}") for i in range(5)]))  # the room was given back
        assert again.status == "completed"

    def test_expiry(self, make_live):
        live = make_live(FakeLLM(delay=0.005), batches(concurrency=2, window=2.0))
        client = live.openai()
        lines = [line("quick", max_tokens=2)]
        lines += [line(f"long {i}", max_tokens=4000, ignore_eos=True) for i in range(5)]
        ended = end(client, begin(client, *lines))
        assert ended.status == "expired"
        assert ended.expired_at >= ended.expires_at
        assert [each["custom_id"] for each in read(client, ended.output_file_id)] == ["quick"]
        late = read(client, ended.error_file_id)
        assert [each["custom_id"] for each in late] == [f"long {i}" for i in range(5)]
        assert {(each["response"], each["error"]["code"]) for each in late} == {(None, "batch_expired")}
        assert (ended.request_counts.completed, ended.request_counts.failed) == (1, 5)
        assert eventually(lambda: not live.engine.running)

    def test_live_requests_come_first(self, make_live):
        """Batches have a part of the engine, at a priority that live requests do not have."""
        live = make_live(FakeLLM(delay=0.002), batches(concurrency=3))
        client = live.openai()
        most = 0
        ended = threading.Event()

        def watch():
            nonlocal most
            while not ended.wait(0.001):
                most = max(most, len(live.engine.running))

        watcher = threading.Thread(target=watch)
        watcher.start()
        lines = [line(f"{i}", max_tokens=5, n=1 + i % 4, priority=-5) for i in range(20)]
        one, two = begin(client, *lines), begin(client, *lines)
        assert end(client, one).request_counts.completed == end(client, two).request_counts.completed == 20
        ended.set()
        watcher.join()
        assert 1 < most <= 3
        assert {options["priority"] for _, _, options in live.engine.opened} == {PRIORITY}
        client.completions.create(model="demo", prompt="a", max_tokens=1)
        assert live.engine.opened[-1][2]["priority"] == 0

    def test_batches_take_turns(self, make_live):
        live = make_live(FakeLLM(delay=0.005), batches(concurrency=1))
        client = live.openai()
        long = begin(client, *[line(f"{i}", max_tokens=5) for i in range(200)])
        short = end(client, begin(client, line("a", max_tokens=1)))
        assert short.status == "completed"
        assert client.batches.retrieve(long.id).status == "in_progress"

    def test_what_the_engine_does_not_take_now_is_asked_again(self, make_live):
        live = make_live()
        client = live.openai()
        live.engine.full = True
        batch = begin(client, line("a"), line("b"))
        assert eventually(lambda: client.batches.retrieve(batch.id).status == "in_progress")
        time.sleep(0.3)
        assert client.batches.retrieve(batch.id).request_counts.failed == 0
        live.engine.full, live.engine.dead = False, "it is being started again"
        time.sleep(0.3)
        live.engine.dead = None
        assert end(client, batch).request_counts.completed == 2

    def test_line_that_fails_harms_only_itself(self, make_live):
        live = make_live()
        client = live.openai()
        live.engine.breaks_after = 3
        ended = end(client, begin(client, line("short", max_tokens=2), line("long", max_tokens=9)))
        assert [each["custom_id"] for each in read(client, ended.output_file_id)] == ["short"]
        (failed,) = read(client, ended.error_file_id)
        assert (failed["custom_id"], failed["response"]["status_code"]) == ("long", 500)

    def test_answers_wait_for_room(self, make_live):
        live = make_live(settings=batches(max_total_file_bytes=6000, concurrency=1))
        client = live.openai()
        ballast = client.files.create(file=("a", b"x" * 3500), purpose="batch")
        batch = begin(client, *[line(f"{i}") for i in range(8)])
        store = live.server.batches.store
        assert eventually(lambda: store.full)
        stands = client.batches.retrieve(batch.id)
        assert stands.status == "in_progress"
        assert stands.request_counts.completed < 8
        with pytest.raises(openai.APIStatusError, match="--max-total-file-bytes"):
            client.batches.create(input_file_id=batch.input_file_id, endpoint=COMPLETIONS, completion_window="24h")
        client.files.delete(ballast.id)
        assert end(client, batch).request_counts.completed == 8


class TestOwners:
    @pytest.fixture
    def named(self, monkeypatch):
        """Keys that are their own names."""
        checked = quire_server.app.AuthMiddleware

        class Named(checked):
            async def __call__(self, scope, receive, send):
                if scope["type"] == "http":
                    key = dict(scope["headers"])[b"authorization"].decode().removeprefix("Bearer ")
                    scope["state"]["key_name"] = key
                await super().__call__(scope, receive, send)

        monkeypatch.setattr(quire_server.app, "AuthMiddleware", Named)

    def test_see_nothing_of_each_other(self, make_live, named):
        live = make_live(settings=Settings(api_keys=("ada", "bob")))
        ada, bob = live.openai(api_key="ada"), live.openai(api_key="bob")
        batch = end(ada, begin(ada, line("a")))
        for file in (batch.input_file_id, batch.output_file_id):
            assert ada.files.retrieve(file)
            for ask in (bob.files.retrieve, bob.files.content, bob.files.delete):
                with pytest.raises(openai.NotFoundError):
                    ask(file)
        for ask in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                ask(batch.id)
        with pytest.raises(openai.NotFoundError):
            bob.batches.create(input_file_id=batch.input_file_id, endpoint=COMPLETIONS, completion_window="24h")
        assert not bob.files.list().data
        assert not bob.batches.list().data
        for after in (lambda: bob.files.list(after=batch.input_file_id), lambda: bob.batches.list(after=batch.id)):
            with pytest.raises(openai.NotFoundError):
                after()
        assert len(ada.files.list().data) == 2

    def test_lines_run_in_the_name_of_the_owner(self):
        app = FastAPI()

        @app.post(COMPLETIONS)
        def route(request: Request):
            return {"owner": request.state.key_name}

        async def ask():
            caller = Caller(Server([FakeLLM()]), app)
            assert caller.endpoints == (COMPLETIONS,)
            return await caller.run(parse(jsonl(line("a")), 1, caller.endpoints), "ada")

        assert json.loads(asyncio.run(ask()).body) == {"owner": "ada"}


class TestStore:
    def test_one_server_at_a_time(self, tmp_path):
        store = Store(tmp_path, BatchSettings())
        with pytest.raises(ConfigError, match="another server"):
            Store(tmp_path, BatchSettings())
        store.close()
        Store(tmp_path, BatchSettings()).close()

    def test_server_says_so_and_ends(self, make_live, tmp_path, caplog):
        store = Store(tmp_path, BatchSettings())
        live = make_live(settings=batches(data_dir=str(tmp_path)), wait=False)
        live.thread.join(20)
        assert live.status == 1
        assert live.engine.shut
        assert "--data-dir" in caplog.text
        store.close()

    def test_folder_that_cannot_be_used(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ConfigError, match="--data-dir"):
            Store(tmp_path / "file", BatchSettings())
        with pytest.raises(ConfigError, match="--batch-concurrency"):
            BatchSettings(concurrency=0)

    def test_write_that_was_interrupted_leaves_nothing(self, tmp_path):
        Store(tmp_path, BatchSettings()).close()
        stray = tmp_path / "files" / "file-1"
        stray.write_text("x")
        Store(tmp_path, BatchSettings()).close()
        assert not stray.exists()

    def test_server_that_ends_leaves_no_temporary_folder(self, make_live):
        live = make_live()
        live.openai().files.create(file=("a", b"{}"), purpose="batch")
        folder = live.server.batches.store.path("x").parent
        assert folder.is_dir()
        live.close()
        assert not folder.exists()

    def test_room_is_in_turn_and_never_overdrawn(self):
        async def check():
            room = Room(4)
            assert await room.take(3) == 3
            large = asyncio.create_task(room.take(9))
            await asyncio.sleep(0)
            room.give(3)
            assert await large == 4
            assert room.free == 0

        asyncio.run(check())


def numbered(path) -> list[dict]:
    return [json.loads(each) for each in path.read_text().splitlines()]


@pytest.mark.slow
def test_killed_and_ended_servers_lose_nothing_and_repeat_nothing(tmp_path):
    """SIGKILL in the middle of a batch, then SIGTERM in the middle of the rest: a third server ends it."""
    flags = ("--data-dir", str(tmp_path), "--batch-concurrency", "2")
    lines = [line(f"{i}", max_tokens=60, ignore_eos=True, seed=i, temperature=1) for i in range(60)]
    before: dict[str, str] = {}

    def recorded():
        """What is on the disk of a server that is gone."""
        with sqlite3.connect(tmp_path / "batches.sqlite") as db:
            rows = [json.loads(output) for (output,) in db.execute("SELECT output FROM results")]
        db.close()
        return {row["custom_id"]: row["id"] for row in rows}

    server = DemoServer(*flags)
    try:
        batch = begin(server.client(), *lines)
        assert eventually(lambda: server.client().batches.retrieve(batch.id).request_counts.completed >= 3, 60)
        server.process.kill()
        server.process.wait(10)
        before = recorded()
        assert 3 <= len(before) < 60
        server = DemoServer(*flags)
        many = len(before) + 3
        assert eventually(lambda: server.client().batches.retrieve(batch.id).request_counts.completed >= many, 60)
        assert server.close() == 0, server.log
        after = recorded()
        assert before.items() <= after.items()
        assert many <= len(after) < 60
        server = DemoServer(*flags)
        client = server.client()
        ended = end(client, batch, 120)
        assert (ended.status, ended.request_counts.completed) == ("completed", 60)
        answers = read(client, ended.output_file_id)
        assert [each["custom_id"] for each in answers] == [each["custom_id"] for each in lines]
        assert after.items() <= {each["custom_id"]: each["id"] for each in answers}.items()
        same = {name: value for name, value in lines[37]["body"].items() if name != "ignore_eos"}
        told = answers[37]["response"]["body"]["choices"][0]["text"]
        assert client.completions.create(**{**same, "extra_body": {"ignore_eos": True}}).choices[0].text == told
    finally:
        server.process.send_signal(signal.SIGKILL)
        server.close()


class TestRunBatch:
    def run(self, source, target, resume=False, engine=None, at_once=3):
        engine = engine or FakeLLM()
        assert asyncio.run(run_batch([engine], Settings(), str(source), str(target), at_once, resume)) == 0
        return engine

    def test_every_line_has_its_answer(self, tmp_path, capsys):
        source, target = tmp_path / "in", tmp_path / "out"
        source.write_bytes(jsonl(line("a"), line("b", CHAT), line("c", model="other"), line("d", n=200)))
        engine = self.run(source, target)
        status = {each["custom_id"]: each["response"]["status_code"] for each in numbered(target)}
        assert status == {"a": 200, "b": 200, "c": 404, "d": 400}
        assert engine.shut
        assert "4 requests run, 2 of them refused or failed" in capsys.readouterr().err

    def test_goes_on_where_it_was(self, tmp_path):
        source, target = tmp_path / "in", tmp_path / "out"
        source.write_bytes(jsonl(*map(line, "abcd")))
        self.run(source, target)
        whole = target.read_bytes().splitlines(keepends=True)
        target.write_bytes(b"".join(whole[:2]) + whole[2][:20])  # ended while it wrote
        with pytest.raises(RunBatchError, match="--resume"):
            self.run(source, target)
        engine = self.run(source, target, resume=True)
        assert len(engine.opened) == 2
        assert target.read_bytes().splitlines(keepends=True)[:2] == whole[:2]
        assert sorted(each["custom_id"] for each in numbered(target)) == list("abcd")
        assert not self.run(source, target, resume=True).opened

    def test_what_cannot_begin(self, tmp_path):
        source, target = tmp_path / "in", tmp_path / "out"
        source.write_bytes(jsonl(line("a"), line("a"), b"x\n"))
        with pytest.raises(RunBatchError, match=r"(?s)line 2: custom_id.*line 3: .*JSON"):
            self.run(source, target)
        assert not target.exists()
        with pytest.raises(RunBatchError, match="No such file"):
            self.run(tmp_path / "none", target)
        source.write_bytes(jsonl(line("a")))
        for content, said in ((b"something\n", "line 1"), (jsonl({"custom_id": "z"}), "not in")):
            target.write_bytes(content)
            with pytest.raises(RunBatchError, match=said):
                self.run(source, target, resume=True)
            assert target.read_bytes() == content

    def test_engine_that_dies_for_good(self, tmp_path):
        source, target = tmp_path / "in", tmp_path / "out"
        source.write_bytes(jsonl(line("a", max_tokens=1), line("b")))

        class Dying(FakeLLM):
            errored = False

            async def generate(self, *arguments, **options):
                if self.opened:
                    self.dead, self.errored = "it is gone", True
                async for item in super().generate(*arguments, **options):
                    yield item

        with pytest.raises(RunBatchError, match="--resume"):
            self.run(source, target, engine=Dying(), at_once=1)
        assert [each["custom_id"] for each in numbered(target)] == ["a"]

    def test_command(self, tmp_path):
        source, target = tmp_path / "in", tmp_path / "out"
        asked = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
        source.write_bytes(jsonl(line("a", CHAT, **asked), line("b", max_tokens=5), line("c")))
        target.write_bytes(jsonl({"custom_id": "c"}) + b'{"custom_id": "b"')
        command = [sys.executable, "-c", "import sys; from quire.cli.main import main; sys.exit(main())", "run-batch"]
        files = ["-i", str(source), "-o", str(target), "--resume"]
        done = subprocess.run(
            [*command, *files, "demo", "--device", "cpu", "--threads", "1"], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        answers = {each["custom_id"]: each for each in numbered(target)}
        assert len(numbered(target)) == 3
        assert "Paris" in answers["a"]["response"]["body"]["choices"][0]["message"]["content"]
        assert answers["b"]["response"]["body"]["usage"]["completion_tokens"] == 5


def test_input_keeps_only_places_in_memory(tmp_path):
    """Blank lines count for the numbers, and a line is found again by its place."""
    path = tmp_path / "in"
    path.write_bytes(b"\n" + jsonl(line("a")) + b"  \r\n" + jsonl(line("b", n=3)).rstrip(b"\n"))
    lines = Input(path, (COMPLETIONS,), Limits(max_body_bytes=10_000, max_body_values=100))
    assert lines.check() == []
    assert [(lines.line(i).number, lines.line(i).custom_id, lines.line(i).sequences) for i in range(2)] == [
        (2, "a", 1), (4, "b", 3),
    ]  # fmt: skip
    assert lines.line(1).body == b'{"model":"demo","prompt":"b","n":3}'
