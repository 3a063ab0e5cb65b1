"""The Grafana dashboard asks only for what the server exports, in PromQL that parses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import promql_parser
import pytest
from fake import FakeLLM

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/quire.json").read_text())
FROM_PROMETHEUS = {"job", "instance"}  # labels that the scrape adds
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


@pytest.fixture(scope="module")
def exported():
    """Sample name to the labels it has, of a server that served some requests."""
    from conftest import Live

    from quire_server.state import Settings

    live = Live(FakeLLM(delay=0.001), Settings(api_keys=("secret",), max_requests_per_minute_per_key=6))
    key = {"Authorization": "Bearer secret"}
    try:
        statuses = set()
        for body in [
            {"prompt": "hi", "max_tokens": 4, "stream": True, "n": 2},
            *[{"prompt": "hello", "max_tokens": 8}] * 8,
        ]:
            statuses.add(httpx.post(f"{live.base}/v1/completions", json=body, headers=key, timeout=20).status_code)
        assert statuses == {200, 429}
        text = httpx.get(f"{live.base}/metrics", headers=key, timeout=20).text
    finally:
        live.close()
    samples: dict[str, set[str]] = {}
    for line in text.splitlines():
        found = re.match(r"([a-zA-Z_:][\w:]*)(?:\{(.*?)\})? ", line)
        if found and not line.startswith("#"):
            samples.setdefault(found[1], set()).update(re.findall(r'(\w+)="', found[2] or ""))
    return samples


def plain(expression: str) -> str:
    """The query with Grafana's variables filled in, as Grafana does before Prometheus sees it."""
    return expression.replace("$__rate_interval", "1m").replace("$model_name", ".*").replace("$job", ".*")


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """(metric, labels that are matched) of every selector in it."""
    found = re.findall(r"([a-zA-Z_][\w]*:?\w*)\{([^}]*)\}", expression)
    return [(name, set(re.findall(r"(\w+)=~?\"", labels))) for name, labels in found]


@pytest.mark.parametrize(("title", "expression"), QUERIES, ids=[f"{t}-{i}" for i, (t, _) in enumerate(QUERIES)])
def test_every_query_asks_for_what_is_exported(exported, title, expression):
    promql_parser.parse(plain(expression))
    used = selectors(expression)
    assert used, title
    for name, labels in used:
        assert name in exported, f"{title}: {name} is not in /metrics"
        assert labels - FROM_PROMETHEUS <= exported[name], f"{title}: {name}"
    # Nothing that looks like a metric stands outside of a selector.
    assert set(re.findall(r"(?:quire|process):?_?\w+", expression)) == {name for name, _ in used}
    for labels in re.findall(r"by \(([^)]*)\)", expression):
        for label in (one.strip() for one in labels.split(",")):
            assert all(label in exported[name] for name, _ in used), f"{title}: {label}"


def test_variables_ask_for_what_is_exported(exported):
    asked = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    assert len(asked) == 2
    for query in asked:
        name, label = re.fullmatch(r"label_values\((quire:\w+)(?:\{.*\})?, (\w+)\)", query).groups()
        assert label in exported[name] | FROM_PROMETHEUS


def test_every_metric_is_shown_or_known_not_to_be(exported):
    """A new metric belongs on the dashboard, or on this list."""
    shown = " ".join(expression for _, expression in QUERIES)
    not_shown = {"quire:cache_config_info", "quire:request_inference_time_seconds"}  # prefill and decode are shown
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exported if name.startswith("quire:")}
    families = {name for name in families if f"{name}_total" not in families}  # _created of counters
    assert {name for name in families if name not in shown} == not_shown


def test_panels_do_not_overlap_and_have_ids_of_their_own():
    seen: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & seen, panel["title"]
        seen |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
