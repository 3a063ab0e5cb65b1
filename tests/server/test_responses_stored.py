"""What /v1/responses keeps: the store and its bounds, owners, responses in the background."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import threading

import httpx
import openai
import pytest
from conftest import eventually
from fake import FakeLLM
from openai.types.responses import Response, ResponseItemList

from quire.errors import ConfigError
from quire_server.app import create_app
from quire_server.openai.responses_store import ResponseStore, StoreSettings
from quire_server.state import Server, Settings


def create(client, text="Hello?", **options):
    return client.responses.create(model="demo", input=text, **options)


def background(client, text="Hello?", **options):
    return create(client, text, background=True, extra_body={"ignore_eos": True}, **options)


def ended(client, response_id):
    """The response, once it has ended."""
    assert eventually(lambda: client.responses.retrieve(response_id).status not in ("queued", "in_progress"))
    return client.responses.retrieve(response_id)


# -- over HTTP ------------------------------------------------------------------------------------------------------
def test_retrieve_and_delete(client):
    response = create(client)
    again = client.responses.retrieve(response.id)
    assert again == response
    Response.model_validate_json(again.to_json())
    client.responses.delete(response.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list(response.id)
    with pytest.raises(openai.BadRequestError) as failed:
        create(client, previous_response_id=response.id)
    assert (failed.value.code, failed.value.param) == ("previous_response_not_found", "previous_response_id")


def test_a_streamed_response_is_there_when_its_last_event_is(client):
    for event in create(client, stream=True):
        last = event
    assert client.responses.retrieve(last.response.id) == last.response


def test_not_stored(client):
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(create(client, store=False).id)


def test_input_items_in_pages(client, http):
    items = [{"role": "user", "content": f"number {i}"} for i in range(7)]
    response = create(client, items)
    page = http.get(f"/v1/responses/{response.id}/input_items", params={"limit": 3}).json()
    ResponseItemList.model_validate(page)
    assert [item["content"][0]["text"] for item in page["data"]] == ["number 6", "number 5", "number 4"]
    assert page["has_more"]
    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][2]["id"])
    for order in ("asc", "desc"):
        listed = list(client.responses.input_items.list(response.id, limit=2, order=order))
        texts = [item.content[0].text for item in listed]
        assert texts == [f"number {i}" for i in (range(7) if order == "asc" else range(6, -1, -1))]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?starting_after=3", "starting_after"),
        ("?stream=perhaps", "stream"),
        ("?stream=true", "stream"),
        ("?stream=true&starting_after=x", "starting_after"),
        ("?include_obfuscation=true", "include_obfuscation"),
        ("?include=x", "include"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=msg_1", "after"),
    ],
)
def test_queries_are_refused_by_name(client, http, path, param):
    answer = http.get(f"/v1/responses/{create(client).id}{path}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_one_key_does_not_see_what_another_stored():
    server = Server([FakeLLM()])
    app = create_app(server)

    async def keyed(scope, receive, send):  # as the layer that knows the keys leaves it
        name = dict(scope["headers"]).get(b"x-test-key")
        scope.setdefault("state", {}).update({"key_name": name.decode()} if name else {})
        await app(scope, receive, send)

    async def talk():
        transport = httpx.ASGITransport(keyed)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            made = {}
            for key in ("ann", "bob", None):
                headers = {"x-test-key": key} if key else {}
                made[key] = (await http.post("/v1/responses", json={"input": "x"}, headers=headers)).json()["id"]
            for key in made:
                headers = {"x-test-key": key} if key else {}
                for owner, response_id in made.items():
                    url = f"/v1/responses/{response_id}"
                    expected = 200 if owner == key else 404
                    assert (await http.get(url, headers=headers)).status_code == expected
                    assert (await http.get(url + "/input_items", headers=headers)).status_code == expected
                    more = {"input": "y", "previous_response_id": response_id}
                    status = (await http.post("/v1/responses", json=more, headers=headers)).status_code
                    assert status == (200 if owner == key else 400)
                    if owner != key:
                        assert (await http.delete(url, headers=headers)).status_code == 404
                        assert (await http.post(url + "/cancel", headers=headers)).status_code == 404

    asyncio.run(talk())
    server.responses.close()


# -- in the background ------------------------------------------------------------------------------------------------
def test_background(make_live):
    live = make_live(FakeLLM(delay=0.002))
    client = live.openai()
    queued = create(client, background=True)
    assert (queued.status, queued.output, queued.background) == ("queued", [], True)
    done = ended(client, queued.id)
    assert done.status == "completed"
    assert done.output_text == create(client).output_text
    assert client.responses.cancel(queued.id) == done  # it has ended: it stays
    Response.model_validate_json(done.to_json())


def test_background_shows_how_far_it_is(make_live):
    live = make_live(FakeLLM(delay=0.002))
    client = live.openai()
    made = background(client)
    assert eventually(lambda: len(client.responses.retrieve(made.id).output_text) > 5)
    assert client.responses.retrieve(made.id).status == "in_progress"
    with pytest.raises(openai.BadRequestError, match="still at work"):
        create(client, previous_response_id=made.id)
    cancelled = client.responses.cancel(made.id)
    assert cancelled.status == "cancelled"
    assert len(cancelled.output_text) > 5
    assert not live.engine.running
    assert client.responses.retrieve(made.id) == cancelled
    assert eventually(lambda: live.server.lifecycle.in_flight == 0)


def test_cancel_while_it_streams(make_live):
    live = make_live(FakeLLM(delay=0.002))
    client = live.openai()
    events, kinds = [], []
    for event in background(client, stream=True):
        events.append(event)
        kinds.append(event.type)
        if kinds.count("response.output_text.delta") == 3 and event.type.endswith("delta"):
            assert client.responses.cancel(events[0].response.id).status == "cancelled"
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
    assert (kinds[-1], events[-1].response.status) == ("response.incomplete", "cancelled")
    assert not live.engine.running


def test_only_what_is_in_the_background_can_be_cancelled(client):
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(create(client).id)


def test_a_stream_in_the_background_outlives_its_reader(make_live):
    live = make_live(FakeLLM(delay=0.002))
    client = live.openai()
    stream = create(client, background=True, stream=True)
    seen = [event for event, _ in zip(stream, range(6), strict=False)]
    stream.close()
    made = seen[0].response.id
    rest = list(client.responses.retrieve(made, stream=True, starting_after=seen[-1].sequence_number))
    numbers = [event.sequence_number for event in [*seen, *rest]]
    assert numbers == list(range(len(numbers)))
    assert rest[-1].type == "response.completed"
    # Once it has ended, the store has the events.
    assert eventually(lambda: not live.server.background._runs)
    again = list(client.responses.retrieve(made, stream=True, starting_after=seen[-1].sequence_number))
    assert again == rest
    text = "".join(e.delta for e in [*seen, *rest] if e.type == "response.output_text.delta")
    assert text == rest[-1].response.output_text == create(client).output_text


def test_deleting_ends_it(make_live):
    live = make_live(FakeLLM(delay=0.002))
    client = live.openai()
    made = background(client)
    client.responses.delete(made.id)
    assert not live.engine.running
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_failure_in_the_background(make_live):
    live = make_live()
    live.engine.fails_after = 3
    failed = ended(live.openai(), create(live.openai(), background=True).id)
    assert (failed.status, failed.error.code) == ("failed", "server_error")
    assert "a kernel failed" in failed.error.message
    live.engine.full = True
    full = ended(live.openai(), create(live.openai(), background=True).id)
    assert (full.status, full.error.code) == ("failed", "rate_limit_exceeded")


def test_bad_requests_are_refused_before_they_wait(client):
    with pytest.raises(openai.BadRequestError) as failed:
        create(client, "x" * 5000, background=True)
    assert failed.value.param == "input"


def test_bounded_in_the_background(make_live):
    live = make_live(FakeLLM(delay=0.005), Settings(store=StoreSettings(max_background=2)), drain_timeout=0.05)
    client = live.openai()
    made = [background(client) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as failed:
        background(client)
    assert failed.value.response.headers["retry-after"]
    create(client)  # others are served
    client.responses.cancel(made[0].id)
    background(client)


def test_a_disk_that_is_full(make_live):
    live = make_live()
    client = live.openai()

    def full(*args):
        raise sqlite3.OperationalError("database or disk is full")

    live.server.responses._put = full
    with pytest.raises(openai.InternalServerError):
        create(client)
    for waits in (True, False):
        events = list(create(client, stream=True, background=not waits))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert (events[-1].type, events[-1].response.status) == ("response.failed", "failed")
        assert "response.completed" not in [event.type for event in events]
    assert eventually(lambda: live.server.lifecycle.in_flight == 0 and not live.server.background._runs)
    assert create(client, store=False).status == "completed"


def test_a_server_that_stops_says_so_in_what_it_stores(make_live, tmp_path):
    settings = Settings(store=StoreSettings(path=tmp_path / "responses.db"))
    live = make_live(FakeLLM(delay=0.005), settings, drain_timeout=0.05)
    done, made = create(live.openai(), max_output_tokens=3), background(live.openai())
    live.close()
    client = make_live(settings=settings).openai()
    stopped = client.responses.retrieve(made.id)
    assert (stopped.status, stopped.error.code) == ("failed", "server_error")
    assert client.responses.retrieve(done.id) == done
    assert create(client, "y", previous_response_id=done.id).status == "completed"


def test_draining_waits_for_the_background(make_live, tmp_path):
    settings = Settings(store=StoreSettings(path=tmp_path / "responses.db"))
    live = make_live(FakeLLM(delay=0.002), settings, drain_timeout=30.0)
    made = create(live.openai(), background=True)
    live.close()
    assert make_live(settings=settings).openai().responses.retrieve(made.id).status == "completed"


# -- the store itself -------------------------------------------------------------------------------------------------
def response(number, status="completed", text=""):
    return {"id": f"resp_{number}", "status": status, "text": text}


def run(work):
    return asyncio.run(work())


def kept(store, numbers):
    async def get():
        return [n for n in numbers if await store.get(f"resp_{n}", None) is not None]

    return run(get)


def test_the_oldest_go_by_count_and_by_bytes(tmp_path):
    path = tmp_path / "r.db"
    store = ResponseStore(StoreSettings(path, max_count=3, max_bytes=10_000))

    async def fill():
        for n in range(5):
            await store.put(response(n), None, [])
        await store.put(response(2, text="again"), None, [])  # a change makes it no younger
        await store.put(response(5), None, [])

    run(fill)
    assert kept(store, range(6)) == [3, 4, 5]
    run(lambda: store.put(response(6), None, [{"text": "x" * 9_930}]))
    assert kept(store, range(7)) == [6]
    run(lambda: store.put(response(7), None, [{"text": "x" * 20_000}]))  # the newest stays even so
    assert kept(store, range(8)) == [7]
    run(lambda: store.put(response(8), None, []))
    assert kept(store, range(9)) == [8]
    store.close()
    reopened = ResponseStore(StoreSettings(path, max_count=2))
    run(lambda: reopened.put(response(9), None, []))
    run(lambda: reopened.put(response(10), None, []))
    assert kept(reopened, range(11)) == [9, 10]
    assert run(lambda: reopened.delete("resp_9", "ann")) is False
    assert run(lambda: reopened.delete("resp_9", None)) is True
    run(lambda: reopened.put(response(11), None, []))
    assert kept(reopened, range(12)) == [10, 11]
    reopened.close()


def test_what_was_at_work_has_failed_after_a_crash(tmp_path):
    path = tmp_path / "r.db"
    store = ResponseStore(StoreSettings(path))
    run(lambda: store.put(response(1, "in_progress"), "ann", [{"a": 1}]))
    run(lambda: store.put(response(2), "ann", []))
    store.close()
    store = ResponseStore(StoreSettings(path))
    body = run(lambda: store.get("resp_1", "ann")).body()
    assert (body["status"], body["error"]["code"]) == ("failed", "server_error")
    assert run(lambda: store.get("resp_2", "ann")).body() == response(2)
    store.close()


def test_the_file_is_private_ours_and_used_once(tmp_path):
    path = tmp_path / "r.db"
    store = ResponseStore(StoreSettings(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="another server"):
        ResponseStore(StoreSettings(path))
    store.close()
    other = tmp_path / "text"
    other.write_text("This is no database at all. " * 100)
    with pytest.raises(ConfigError, match="--response-store"):
        ResponseStore(StoreSettings(other))
    with pytest.raises(ConfigError, match="--response-store"):
        ResponseStore(StoreSettings(tmp_path / "no" / "such" / "folder"))


def test_the_event_loop_does_not_wait_for_the_disk(tmp_path):
    store = ResponseStore(StoreSettings(tmp_path / "r.db"))
    busy = threading.Event()
    store._pool.submit(busy.wait, 10)  # a disk that takes its time

    async def work():
        put = asyncio.ensure_future(store.put(response(1), None, []))
        await asyncio.sleep(0.01)
        assert not put.done()
        busy.set()
        await put

    run(work)
    assert kept(store, [1]) == [1]
    store.close()
