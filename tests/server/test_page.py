"""The page at / and the view of the engine that it shows."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import ExitStack

import httpx
import numpy as np
import pytest
from browser import CHROMIUM, Browser
from conftest import eventually
from demo_server import ADD_PARAMETERS, DemoServer
from fake import FakeLLM

from quire.kv.accounts import CACHED, FREE, OWNED, RESERVED, SHARED
from quire.message import EngineStats, SequenceState
from quire_server import engine_view
from quire_server.engine_view import MAX_CELLS, MAX_LISTENERS, MAX_OWNERS, owners, page_map
from quire_server.state import Settings


class PagedLLM(FakeLLM):
    """A fake engine with a page map."""

    def __init__(self, pages: bytes = bytes([RESERVED, FREE, CACHED, OWNED, SHARED, OWNED]), **options) -> None:
        super().__init__(**options)
        self.pages, self.asked = pages, 0
        self.sequences = [
            SequenceState("cmpl-first-0", 0, "running", 40, 7, 46, 1.5, [[3, 4]]),
            SequenceState("cmpl-second-0", 1, "running", 20, 30, 49, 2.5, [[4, 5]]),
            SequenceState("chatcmpl-third", 0, "waiting", 900, 0, 0, 12.25, [[]]),
        ]

    async def stats(self, pages: bool = False, timeout: float = 5.0) -> EngineStats:
        stats = await super().stats(pages, timeout)
        self.asked += 1
        stats.pages = [self.pages] if pages else None
        stats.sequences = self.sequences if pages else None
        return stats


# -- what is served ------------------------------------------------------------------------------------------------
def test_page_is_complete_small_and_guarded_by_its_policy(http):
    page = http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    named = set(re.findall(r'(?:src|href)="([^"#]+)"', page.text))
    assert {"pages/app.js", "pages/page.css"} <= named
    total = len(page.content)
    todo, seen = list(named), set()
    while todo:
        name = todo.pop()
        seen.add(name)
        asset = http.get(f"/{name}")
        assert asset.status_code == 200, name
        assert asset.headers["x-content-type-options"] == "nosniff"
        total += len(asset.content)
        todo += [
            f"pages/{n}" for n in re.findall(r'from "\./([^"]+)"', asset.text) if f"pages/{n}" not in (*seen, *todo)
        ]
    assert len(seen) >= 6
    assert total < 100_000
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", page.text)


def test_nothing_but_the_named_files(http):
    for path in ("/pages/", "/pages/__init__.py", "/pages/../auth.py", "/pages/%2e%2e/auth.py", "/pages/index.html"):
        assert http.get(path).status_code == 404, path


def test_no_markup_is_made_of_text():
    from quire_server.pages import ASSETS

    for path, (content, _) in ASSETS.items():
        if path.endswith(".js"):
            sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|setHTML"
            assert not re.search(sinks, content.decode()), path
            assert not re.search(r"https?://", content.decode()), f"{path} names an address"


# -- /engine -------------------------------------------------------------------------------------------------------
def test_engine_shows_what_the_engine_says(make_live):
    live = make_live(PagedLLM())
    with live.http() as http:
        body = {"model": "demo", "prompt": "hello", "max_tokens": 8}
        assert http.post("/v1/completions", json=body).status_code == 200
        view = http.get("/engine").json()
    assert (view["waiting"], view["pages_total"], view["pages_free"], view["preemptions"]) == (2, 64, 48, 7)
    assert (view["model"], view["state"], view["device"], view["page_size"]) == ("demo", "serving", "fake", 16)
    (group,) = view["page_map"]
    assert group["cells"] == "12343"
    assert [group[name] for name in ("pages", "free", "cached", "owned", "shared")] == [5, 1, 1, 2, 1]
    assert group["owners"] == [[2, 1, [0], 0], [3, 1, [0, 1], 0], [4, 1, [1], 0]]
    first, second, third = view["requests"]
    assert (first["id"], first["state"], first["prompt_tokens"], first["output_tokens"]) == (
        "cmpl-first-0",
        "running",
        40,
        7,
    )
    assert (second["index"], second["pages"], second["computed_tokens"]) == (1, 2, 49)
    assert (third["state"], third["age"], third["pages"]) == ("waiting", 12.25, 0)
    assert view["ttft"]["count"] == 1
    assert view["itl"]["count"] == 7
    bound, count = view["ttft"]["buckets"][-1]
    assert (bound, count) == (None, 1)
    counts = [n for _, n in view["itl"]["buckets"]]
    assert counts == sorted(counts)
    assert counts[-1] == 7


def test_engine_answers_503_when_the_engine_does_not(make_live):
    engine = PagedLLM()
    live = make_live(engine, Settings(health_timeout=0.05))
    engine.hangs = True
    with live.http() as http:
        answer = http.get("/engine")
        assert answer.status_code == 503
        assert "0.05 s" in answer.json()["error"]["message"]
        with http.stream("GET", "/engine/stream") as stream:  # it goes on, and says so
            first = next(line for line in stream.iter_lines() if line.startswith("data:"))
    assert "did not answer" in json.loads(first[5:])["error"]


def test_stream_listeners_are_bounded_and_share_one_question(make_live):
    engine = PagedLLM()
    live = make_live(engine)
    with live.http() as http, ExitStack() as stack:
        streams = [stack.enter_context(http.stream("GET", "/engine/stream")) for _ in range(MAX_LISTENERS)]
        texts = [stream.iter_text() for stream in streams]
        for _ in range(2):
            views = [json.loads(next(text).removeprefix("data:")) for text in texts]
            assert all(view["page_map"][0]["cells"] == "12343" for view in views)
        assert engine.asked <= 8
        refused = http.get("/engine/stream")
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
    with live.http() as http:  # those that left make room
        assert eventually(lambda: live.server is not None and _opens(http))


def _opens(http: httpx.Client) -> bool:
    with http.stream("GET", "/engine/stream") as stream:
        return stream.status_code == 200


def test_an_open_stream_does_not_hold_up_the_drain(make_live):
    live = make_live(PagedLLM(), drain_timeout=30.0)
    with live.http() as http, http.stream("GET", "/engine/stream") as stream:
        next(stream.iter_text())
        live.ask_to_stop()
        live.thread.join(10)
        assert not live.thread.is_alive()


def test_key_guards_the_data_but_not_the_page(make_live):
    live = make_live(PagedLLM(), Settings(api_keys=("secret",)))
    with live.http() as http:
        assert http.get("/").status_code == 200
        assert http.get("/pages/app.js").status_code == 200
        for path in ("/engine", "/engine/stream", "/pages/nothing.js"):
            assert http.get(path).status_code == 401, path
        assert http.get("/engine", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_large_maps_are_sampled_down_without_losing_the_sums():
    generator = np.random.default_rng(0)
    states = generator.integers(FREE, SHARED + 1, 100_001).astype(np.uint8)
    states[0] = RESERVED
    states[1:2001] = OWNED
    groups = page_map(EngineStats(pages=[states.tobytes(), bytes([RESERVED, SHARED, FREE])]))
    assert sum(len(group["cells"]) for group in groups) <= MAX_CELLS
    large, small = groups
    counted = Counter(states[1:].tolist())
    assert [large[name] for name in ("free", "cached", "owned", "shared")] == [counted[s] for s in range(FREE, 5)]
    size = large["pages_per_cell"]
    assert len(large["cells"]) == -(-100_000 // size)
    for i, cell in enumerate(large["cells"]):  # each cell shows a state that no other outnumbers
        here = Counter(states[1 + i * size : 1 + (i + 1) * size].tolist())
        assert here[int(cell)] == max(here.values())
    assert small["cells"] == "41"


def test_owners_are_runs_of_cells():
    everybody = [[1, 2, 3, 4, 5, 6, 20], [5, 6], [20], []]
    assert owners(everybody, 1) == [[0, 4, [0], 0], [4, 2, [0, 1], 0], [19, 1, [0, 2], 0]]
    assert owners(everybody, 4) == [[0, 1, [0], 0], [1, 1, [0, 1], 0], [4, 1, [0, 2], 0]]
    assert owners([[7]] * 11, 2) == [[3, 1, list(range(MAX_OWNERS)), 3]]


def test_the_map_of_a_large_pool_is_asked_for_rarely(make_live):
    engine = PagedLLM()
    engine._info.pages = int(1000 / engine_view.SECONDS_PER_PAGE)
    maps = 0
    plain = engine.stats

    async def counted(pages: bool = False, timeout: float = 5.0) -> EngineStats:
        nonlocal maps
        maps += pages
        return await plain(pages, timeout)

    engine.stats = counted
    live = make_live(engine)
    with live.http() as http, http.stream("GET", "/engine/stream") as stream:
        text = stream.iter_text()
        views = [json.loads(next(text).removeprefix("data:")) for _ in range(3)]
    assert maps == 1
    assert all(view["page_map"] == views[0]["page_map"] for view in views)


# -- in a browser --------------------------------------------------------------------------------------------------
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser():
    one = Browser()
    yield one
    one.close()


@pytest.fixture(scope="module")
def demo():
    server = DemoServer("--kv-cache-memory-bytes", "8M", "--max-model-len", "1024")
    yield server
    assert server.close() == 0, server.log


SAID = "[...document.querySelectorAll('.message.assistant .body')].at(-1)?.innerText"
IDLE = "document.querySelector('#stop').disabled"


def say(browser, text):
    browser.run("document.querySelector('#prompt').focus()")
    browser.type(text)
    browser.key("Enter")
    browser.wait(f"document.querySelector('#prompt').value === '' && {IDLE}")


@needs_browser
def test_chat_with_the_demo_model(browser, demo):
    browser.open(demo.base)
    browser.wait("document.querySelector('#model').textContent === 'demo'")
    browser.run("document.querySelector('#temperature').value = '0'")
    say(browser, "What is the capital of France?")
    browser.wait(f"({SAID} || '').includes('Paris')")
    # A token's probability by keyboard.
    browser.run("[...document.querySelectorAll('button')].find(b => b.textContent === 'Token probabilities').click()")
    browser.run("document.querySelector('.token').focus()")
    browser.key("ArrowRight")
    assert re.search(r"\d+\.\d+ %", browser.run("document.querySelector('#tip').innerText"))
    assert browser.run("document.querySelectorAll('#tip .chosen').length") == 1
    joined = browser.run("[...document.querySelectorAll('.token')].map(t => t.textContent).join('')")
    assert "Paris" in joined
    # The same question again takes the place of the answer.
    browser.run("document.querySelector('#retry').click()")
    browser.wait(f"{IDLE} && ({SAID} || '').includes('Paris')")
    assert browser.run("document.querySelectorAll('.message').length") == 2
    # The engine is seen to have worked, and everything came from this server under its policy.
    browser.wait("/[1-9]/.test(document.querySelector('#legend').innerText.split('cached')[1])")
    assert "cached" in browser.run("document.querySelector('#pages').getAttribute('aria-label')")
    assert browser.run("document.querySelectorAll('#numbers dd').length") >= 9
    assert all(url.startswith(demo.base) for url in browser.addresses()), browser.addresses()
    assert browser.complaints() == []


@needs_browser
def test_tools_are_called_and_their_results_sent(browser, demo):
    tools = [
        {
            "type": "function",
            "function": {
                "name": "add",
                "description": "Add two numbers.",
                "parameters": ADD_PARAMETERS,
            },
        }
    ]
    browser.open(demo.base)
    browser.wait("document.querySelector('#model').textContent === 'demo'")
    browser.run("document.querySelector('#temperature').value = '0'")
    browser.run(f"document.querySelector('#tools').value = {json.dumps(json.dumps(tools))}")
    say(browser, "What is 12 + 30?")
    browser.wait("document.querySelector('form.tool textarea')")
    assert "calls add" in browser.run(SAID)
    browser.run("document.querySelector('form.tool textarea').value = '{\"result\": 42}'")
    browser.run("document.querySelector('form.tool').requestSubmit()")
    browser.wait(f"{IDLE} && ({SAID} || '').includes('42')")
    assert browser.complaints() == []


@needs_browser
def test_a_mistake_in_a_box_is_shown_at_the_box(browser, demo):
    browser.open(demo.base)
    browser.wait("document.querySelector('#model').textContent === 'demo'")
    browser.run("document.querySelector('#schema').value = '{'")
    say(browser, "hello")
    assert "not JSON" in browser.run("document.querySelector('#log .error').innerText")
    assert browser.run("document.activeElement.id") == "schema"
    browser.run("document.querySelector('#schema').value = ''; document.querySelector('#max_tokens').value = '100000'")
    browser.run("document.querySelector('#retry').click()")
    browser.wait(f"{IDLE} && document.querySelector('#log .message .error')")
    assert "1024" in browser.run("document.querySelector('#log .message .error').innerText")  # the server's own words
    assert browser.run("document.activeElement.id") == "max_tokens"


HOSTILE = """# Title <script>window.hit = 1</script>

<img src=x onerror="window.hit = 1"> **bold** and `code` [good](https://example.org/a) [bad](javascript:window.hit=1)

- one
- two *em*
  - inner

```js
window.hit = 1; "<b>"
```

| a | b |
|---|---|
| 1 | <i>2</i> |
"""


@needs_browser
def test_a_hostile_model_gets_text_and_markdown_only(browser, make_live):
    engine = PagedLLM()
    engine.script = HOSTILE
    live = make_live(engine)
    browser.open(live.base)
    browser.wait("document.querySelector('#model').textContent === 'demo'")
    say(browser, "go")
    browser.wait("document.querySelector('.message.assistant .body table td')")
    body = "document.querySelector('.message.assistant .body')"
    assert browser.run("window.hit") is None
    assert browser.run(f"{body}.querySelectorAll('script, img, i, b').length") == 0
    assert browser.run(f"{body}.querySelector('h3').textContent") == "Title <script>window.hit = 1</script>"
    assert browser.run(f"{body}.querySelector('strong').textContent") == "bold"
    assert browser.run(f"[...{body}.querySelectorAll('a')].map(a => a.href)") == ["https://example.org/a"]
    assert browser.run(f"{body}.querySelector('li li').textContent") == "inner"
    assert browser.run(f"{body}.querySelector('pre').textContent") == 'window.hit = 1; "<b>"'
    assert browser.run(f"[...{body}.querySelectorAll('td')].map(a => a.textContent)") == ["1", "<i>2</i>"]
    assert browser.complaints() == []


@needs_browser
def test_stop_by_keyboard_ends_the_request(browser, make_live):
    engine = PagedLLM(delay=0.05)
    live = make_live(engine)
    browser.open(live.base)
    browser.wait("document.querySelector('#model').textContent === 'demo'")
    browser.run("document.querySelector('#prompt').focus()")
    browser.type("go")
    browser.key("Enter")
    browser.wait(f"({SAID} || '').length > 3")
    browser.key("Escape")
    browser.wait(IDLE)
    assert eventually(lambda: bool(engine.aborted))
    assert "ended by you" in browser.run("document.querySelector('.message.assistant .who').innerText")


TIP = "document.querySelector('#tip').hidden ? '' : document.querySelector('#tip').innerText"
ON = "[...document.querySelectorAll('#requests tr.on th')].map(e => e.textContent)"


@needs_browser
def test_a_cell_tells_its_state_and_who_holds_it(browser, make_live):
    live = make_live(PagedLLM())
    browser.open(live.base)
    browser.wait("document.querySelectorAll('#requests tbody tr').length === 3")
    box = browser.run(
        "(() => { const b = document.querySelector('#pages').getBoundingClientRect(); return [b.left, b.top]; })()"
    )

    def cell(i: int) -> tuple[float, float]:  # sixteen pixels each: there are few
        return box[0] + 16 * i + 8, box[1] + 8

    expected = [
        ("Page 1: free", "holds nothing", []),
        ("Page 2: cached", "held by nobody; its prefix can be used again", []),
        ("Page 3: owned", "cmpl-first-0\n  running, 46 tokens in 2 pages", ["cmpl-first-0"]),
        ("Page 4: shared", "cmpl-second-0 #1\n  running, 49 tokens in 2 pages", ["cmpl-first-0", "cmpl-second-0 #1"]),
        ("Page 5: owned", "cmpl-second-0 #1\n  running", ["cmpl-second-0 #1"]),
    ]
    for i, (state, said, on) in enumerate(expected):  # by pointer
        browser.hover(*cell(i))
        browser.wait(f"({TIP}).includes({json.dumps(state)})")
        assert said in browser.run(TIP)
        assert browser.run(ON) == on
    browser.hover(5, 5)
    browser.wait(f"({TIP}) === ''")
    assert browser.run(ON) == []
    browser.run("document.querySelector('#prompt').focus()")
    for _ in range(20):  # by keyboard: Tab gets there
        browser.key("Tab")
        if browser.run("document.activeElement.id") == "pages":
            break
    assert "Page 1: free" in browser.run(TIP)
    for key, state in (
        ("ArrowRight", "Page 2"),
        ("End", "Page 5"),
        ("ArrowRight", "Page 5"),
        ("ArrowLeft", "Page 4"),
        ("Home", "Page 1"),
    ):
        browser.key(key)
        assert state in browser.run(TIP), key
        assert state in browser.run("document.querySelector('#cell').textContent")  # read out
    browser.key("Escape")
    assert browser.run(TIP) == ""
    assert browser.complaints() == []


@needs_browser
def test_requests_are_listed(browser, make_live):
    live = make_live(PagedLLM())
    browser.open(live.base)
    browser.wait("document.querySelectorAll('#requests tbody tr').length === 3")
    rows = browser.run(
        "[...document.querySelectorAll('#requests tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    )
    assert rows[0] == ["cmpl-first-0", "running", "40", "7", "2", "1.5 s"]
    assert rows[2] == ["chatcmpl-third", "waiting", "900", "0", "0", "12.3 s"]
    live.engine.sequences = []
    browser.wait("document.querySelectorAll('#requests tbody tr').length === 0")
    assert (
        browser.run("document.querySelector('#requests-rest').textContent") == "and 2 more"
    )  # the fake says that 2 wait


@needs_browser
def test_every_sampling_box_reaches_the_engine(browser, make_live):
    live = make_live(PagedLLM())
    browser.open(live.base)
    browser.wait("document.querySelector('#model').textContent === 'demo'")
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "max_tokens": 5, "seed": 3,
    }  # fmt: skip
    for name, value in given.items():
        browser.run(f"document.querySelector('#{name}').value = '{value}'")
    say(browser, "go")
    browser.wait(f"({SAID} || '').length > 0")
    _, sampling, _ = live.engine.opened[-1]
    assert {name: getattr(sampling, name) for name in given} == given
    assert sampling.logprobs == 5
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    browser.run(f"document.querySelector('#schema').value = {json.dumps(json.dumps(schema))}")
    say(browser, "again")
    assert eventually(lambda: len(live.engine.opened) == 2)
    assert live.engine.opened[-1][1].structured_outputs.json == json.dumps(schema, separators=(",", ":"))


@needs_browser
def test_key_is_asked_for_and_used(browser, make_live):
    live = make_live(PagedLLM(), Settings(api_keys=("secret",)))
    browser.open(live.base)
    browser.wait("!document.querySelector('#key-form').hidden && document.activeElement.id === 'key'")
    browser.type("secret")
    browser.key("Enter", "\r")
    browser.wait("document.querySelector('#model').textContent === 'demo'")
    browser.wait("document.querySelector('#key-form').hidden && document.querySelectorAll('#legend li').length === 4")
    say(browser, "go")
    browser.wait(f"({SAID} || '').length > 3")
    assert browser.run("JSON.stringify(localStorage)") == "{}"


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_fits_a_phone_and_can_be_read(browser, make_live, dark):
    live = make_live(PagedLLM())
    browser.open(live.base, 360, 740, dark=dark, phone=True)
    browser.wait("document.querySelectorAll('#legend li').length === 4")
    assert browser.run("document.documentElement.scrollWidth") <= 360
    # A long conversation scrolls in its own box; opened settings push the rest down instead of covering it.
    long = "Object.assign(document.createElement('pre'), {textContent: 'x\\n'.repeat(200)})"
    browser.run(f"document.querySelector('#log').append({long})")
    assert browser.run("document.querySelector('#log').clientHeight") < 740
    browser.run("document.querySelector('#settings').open = true")
    settings = "document.querySelector('#settings')"
    assert browser.run(f"{settings}.scrollHeight <= {settings}.clientHeight")
    assert browser.run("document.documentElement.scrollWidth") <= 360
    browser.run("document.querySelector('#settings').open = false; document.querySelector('#log').replaceChildren()")
    # WCAG 2's contrast of text on its background, at least 4.5 (AA).
    names = ["text", "quiet", "bad", "accent"]
    read = "name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
    colours = dict(zip(names, browser.run(f"{json.dumps(names)}.map({read})"), strict=True))
    card = browser.run("getComputedStyle(document.documentElement).getPropertyValue('--card').trim()")
    for name, colour in colours.items():
        assert contrast(colour, card) >= 4.5, (name, colour, card)
    # Every control has a name for those who do not see it.
    unnamed = "[...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length).map(e => e.id)"
    assert browser.run(unnamed) == []


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
