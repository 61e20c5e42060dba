"""The dashboard in examples/ asks for metrics and labels that exist, and leaves none out."""

import json
import re
from pathlib import Path

from sglang_dsv4.plugin.observe.metrics import METRICS

FILE = Path(__file__).parents[2] / "examples" / "grafana" / "sglang-dsv4.json"
LABELS = {metric.name: {*metric.labels, "instance", "model_name", "tp_rank"} for metric in METRICS}
SGLANG = r'__name__=~"sglang\[:_\]\w+"'


def faults(expression, legend):
    """What an expression asks for and no metric has."""
    found = re.findall(r"(sglang_dsv4_\w+)\{([^}]*)\}", expression)
    names = [name for name, _ in found]
    yield from (f"no metric {name}" for name in names if name not in LABELS)
    if not names and not re.search(SGLANG, expression):
        yield "no metric at all"
    known = set.intersection(*(LABELS.get(name, set()) for name in names)) if names else set()
    grouped = re.findall(r"\bby \(([^)]*)\)", expression)
    groups = {label.strip() for group in grouped for label in group.split(",")}
    selected = {label for _, text in found for label in re.findall(r"(\w+)(?:=~|=)\"", text)}
    yield from (f"no label {label}" for label in sorted((groups | selected) - known) if names)
    shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
    yield from (f"{label} is shown, but not grouped by" for label in sorted(shown - groups))


def targets():
    for panel in json.loads(FILE.read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            yield panel, target


def test_every_expression_asks_for_what_is_there():
    assert [fault for _, t in targets() for fault in faults(t["expr"], t["legendFormat"])] == []


def test_every_metric_is_on_it():
    asked = {name for _, t in targets() for name in re.findall(r"sglang_dsv4_\w+", t["expr"])}
    assert asked == {metric.name for metric in METRICS}


def test_counters_are_shown_as_rates():
    counters = {metric.name for metric in METRICS if metric.kind == "counter"}
    for panel, target in targets():
        for name in re.findall(r"(?<!rate\()\b(sglang_dsv4_\w+)", target["expr"]):
            assert name not in counters or panel["type"] == "stat", panel["title"]


def test_panels_do_not_overlap():
    taken = set()
    for place in (panel["gridPos"] for panel in json.loads(FILE.read_text(encoding="utf-8"))["panels"]):
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells


def test_a_wrong_expression_is_found():
    wrong = 'sum by (state) (sglang_dsv4_pages{pol="history"})'
    assert list(faults(wrong, "{{pool}}")) == ["no label pol", "pool is shown, but not grouped by"]
    assert list(faults("sum(sglang_dsv4_page{})", "")) == ["no metric sglang_dsv4_page"]
