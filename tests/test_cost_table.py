"""The table of costs: the page shows what the file of figures says, and the command that measures them runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.small_resnet import SmallResNet

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import costs


@pytest.mark.parametrize("page", costs.PAGES, ids=lambda page: page.name)
def test_the_page_shows_the_file(page):
    report = json.loads((costs.HERE / "costs.json").read_text())
    assert report
    for name, found in report.items():
        assert name == costs.name_of(found["machine"])
        assert found["costs"].keys() == costs.KINDS.keys()
    assert costs.in_docs(page.read_text()) == costs.table(report), "run tests/benchmarks/costs.py --docs"


def test_tables_replace_those_between_the_marks():
    page = f"before\n{costs.MARKS[0]}\nold\n{costs.MARKS[1]}\nafter"
    new = costs.with_tables(page, "one\n\ntwo")
    assert new == page.replace("old", "one\n\ntwo")
    assert costs.in_docs(new) == "one\n\ntwo"


@pytest.mark.parametrize("phase", costs.PHASES)
@pytest.mark.parametrize("kind", ["sgd", "codes"])
def test_a_kind_is_measured(kind, phase, monkeypatch):
    """By a clock that counts forward passes: a step, a batch, and one more sample are one of them each."""
    passes: list[None] = []

    def counted():
        net = SmallResNet(4)
        net.register_forward_hook(lambda *call: passes.append(None))
        return net

    monkeypatch.setattr(costs, "CLOCK", lambda: len(passes))
    found = costs.cost(kind, phase, counted, batch=4, budget=0.0)
    weights = sum(p.numel() for p in SmallResNet(4).parameters())
    assert found.keys() == {"seconds", "peak_bytes", "bytes"}
    assert found["seconds"] == 1
    assert found["peak_bytes"] >= 0
    assert (found["bytes"] >= 4 * weights) == (kind == "sgd")
    assert found["bytes"] >= weights
