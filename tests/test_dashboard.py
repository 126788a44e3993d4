"""The dashboard, the alerts and the page about metrics: they name what there is, and all of it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay.metrics import Metrics

DEPLOY = Path(__file__).parent.parent / "deploy"
ALERTS = yaml.safe_load((DEPLOY / "prometheus-alerts.yaml").read_text("utf-8"))
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text("utf-8"))
# What Prometheus itself says of whom it asks.
OF_PROMETHEUS = {"up": {"job", "instance"}}
# What it adds to everything.
ADDED = {"job", "instance", "le"}


def rules() -> Iterator[dict[str, Any]]:
    for group in ALERTS["groups"]:
        yield from group["rules"]


def panels() -> list[dict[str, Any]]:
    return list(DASHBOARD["panels"])


QUERIES = [
    *((one["alert"], one["expr"]) for one in rules()),
    *((one["title"], target["expr"]) for one in panels() for target in one["targets"]),
]


def known() -> dict[str, set[str]]:
    """The labels of each metric, by the names under which its values are found."""
    metrics, found = Metrics(["luma"]), dict(OF_PROMETHEUS)
    for family in metrics.registry.collect():
        collector = metrics.registry._names_to_collectors.get(family.name)
        labels = set(getattr(collector, "_labelnames", ()))
        for suffix in {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(
            family.type, [""]
        ):
            found[family.name + suffix] = labels
    return found


@pytest.mark.parametrize(("where", "query"), QUERIES)
def test_every_metric_and_label_that_is_named_exists(where: str, query: str):
    there = known()
    bare = re.sub(r'"[^"]*"', '""', query)
    named = set(re.findall(r"\b(?:relay|process)_\w+|\bup\b", bare))
    assert named
    assert named <= there.keys()
    labels = {one for text in re.findall(r"\bby \(([^)]*)\)", bare) for one in re.split(r",\s*", text)}
    labels |= set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"", bare))
    assert labels - ADDED <= set.union(*(there[name] for name in named))
    for opening, closing in ("()", "{}", "[]"):
        assert bare.count(opening) == bare.count(closing)


def test_everything_that_is_measured_is_shown_somewhere():
    shown = " ".join(query for _, query in QUERIES)
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known() if name.startswith("relay_")}
    # Two say the same in other words: a status and how long to wait.
    assert {name for name in ours if name not in shown} == {"relay_account_failures"}


def test_everything_that_is_measured_is_explained_with_its_labels():
    text = (DEPLOY.parent / "docs" / "watching.md").read_text("utf-8")
    there = {name: labels for name, labels in known().items() if name.startswith("relay_")}
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| `relay_")]
    explained = {}
    for names, labels, _ in rows:
        explained |= {name: set(re.findall(r"\w+", labels)) for name in re.findall(r"relay_\w+", names)}
    for name, labels in there.items():
        bare = re.sub(r"_(bucket|sum|count)$", "", name)
        assert labels <= explained[bare], name
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in there} == explained.keys()


def test_alerts_have_the_shape_that_prometheus_wants():
    assert set(ALERTS) == {"groups"}
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) > 5
    for rule in rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        told = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        grouped = re.search(r"\bby \(([^)]*)\)", rule["expr"])
        assert told <= set(re.split(r",\s*", grouped[1])) if grouped else not told


def test_the_dashboard_has_panels_that_do_not_overlap():
    assert len({one["id"] for one in panels()}) == len({one["title"] for one in panels()}) == len(panels())
    places = {(one["gridPos"]["x"], one["gridPos"]["y"]) for one in panels()}
    assert len(places) == len(panels())
    for one in panels():
        assert one["targets"]
        assert one["datasource"]["uid"] == "${datasource}"
    assert {one["name"] for one in DASHBOARD["templating"]["list"]} == {"datasource", "job"}
