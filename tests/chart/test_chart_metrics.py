"""The chart's alerts and dashboards ask for metrics that the processes really have."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvasir_engine.worker.metrics import Gauges, WorkerMetrics
from kvasir_kvstore.metrics import NodeMetrics, TierMetrics
from kvasir_operator import metrics as operator_metrics
from kvasir_router.metrics import SECONDS, RouterMetrics
from prometheus_client import CollectorRegistry

CHART = Path(__file__).parents[2] / "helm/kvasir"
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}
ASKED = re.compile(r"\b(kvasir_[a-z_]+)(?:{([^}]*)})?")
LABEL = re.compile(r'([a-z_]+)\s*(?:=~|!=|!~|=)\s*"')
SCRAPED_LABELS = {"namespace", "pod", "pool", "model_service", "role", "service", "le"}


def _exported() -> dict[str, set[str]]:
    """The labels of every metric of every process, by the metric's name as it is asked for."""
    worker = WorkerMetrics(Gauges)
    TierMetrics(worker.registry)
    registries: list[CollectorRegistry] = [
        worker.registry,
        NodeMetrics(dict, list).registry,
        RouterMetrics().registry,
        operator_metrics.REGISTRY,
    ]
    found: dict[str, set[str]] = {}
    for registry in registries:
        for collector in set(registry._collector_to_names):
            labels = set(getattr(collector, "_labelnames", ()))
            for family in collector.collect():
                for suffix in SUFFIXES.get(family.type, ()):
                    found[family.name + suffix] = labels
    return found


EXPORTED = _exported()


def _alert_queries() -> Iterator[str]:
    text = (CHART / "templates/rules.yaml").read_text()
    yield from re.findall(r"expr: (?:\|\n)?((?:.+\n)+?)(?= *(?:for|labels|- |{{-))", text)


def _panel_queries(path: Path) -> Iterator[str]:
    for panel in json.loads(path.read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def _unknown(query: str) -> list[str]:
    wrong = []
    for name, matchers in ASKED.findall(query):
        if name not in EXPORTED:
            wrong.append(name)
            continue
        labels = set(LABEL.findall(matchers)) - SCRAPED_LABELS
        wrong += [f"{name}{{{label}}}" for label in sorted(labels - EXPORTED[name])]
    return wrong


def test_alerts_ask_for_metrics_that_exist() -> None:
    queries = list(_alert_queries())
    assert len(queries) >= 10
    assert [wrong for query in queries for wrong in _unknown(query)] == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_asks_for_metrics_that_exist(path: Path) -> None:
    queries = list(_panel_queries(path))
    assert len(queries) >= 5
    assert [wrong for query in queries for wrong in _unknown(query)] == []


def test_slo_of_the_alerts_is_a_bucket_of_the_router() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    rules = schema["properties"]["monitoring"]["properties"]["rules"]["properties"]
    assert set(rules["ttftSloSeconds"]["enum"]) <= set(SECONDS)


def test_every_value_of_the_chart_is_in_its_schema() -> None:
    yaml = pytest.importorskip("yaml")
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert list(_unlisted(values, schema, "")) == []


def _unlisted(values: object, schema: dict[str, object], path: str) -> Iterator[str]:
    known = schema.get("properties")
    if not isinstance(values, dict) or not isinstance(known, dict):
        return
    for key, value in values.items():
        if key not in known:
            yield f"{path}.{key}"
        else:
            yield from _unlisted(value, known[key], f"{path}.{key}")
