"""What compared runs cost, read back from files that may hold anything."""

import json
from types import SimpleNamespace

import pytest

from dinoseg.evaluation.sides import Side
from dinoseg.modes import compare
from dinoseg.training.cost import COST

GOOD = {"parameters": 5, "trainable": 1, "images_per_s": 4.0, "memory_gib": 0.5}


@pytest.fixture
def row(tmp_path, monkeypatch):
    """Return a function that makes the row of a run whose record of costs is some text."""
    monkeypatch.setattr(compare, "scores_of", lambda records: {"miou": 0.5, "accuracy": 0.6})

    def row_of(text):
        (tmp_path / COST).write_text(text)
        record = SimpleNamespace(source=str(tmp_path / "checkpoints/best.safetensors"))
        return compare.run_rows([Side("a", [tmp_path], ["a"], [tmp_path], [record])])[0]

    return row_of


def test_row_has_costs_and_scores(row, caplog):
    assert row(json.dumps(GOOD)) == {
        "run": "a",
        "miou": 0.5,
        "accuracy": 0.6,
        "parameters": 5,
        "trainable": 1,
        "memory_gib": 0.5,
        "seconds": 0.25,
    }
    assert not caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"parameters": 1',
        json.dumps(GOOD | {"more": 1}),
        json.dumps(GOOD | {"images_per_s": 1e-320}),  # its inverse is inf
        json.dumps(GOOD | {"images_per_s": float("inf")}),
        json.dumps(GOOD | {"memory_gib": 10**400}),
        json.dumps(GOOD | {"memory_gib": float("nan")}),
        json.dumps(GOOD | {"memory_gib": "much"}),
        json.dumps(GOOD | {"parameters": 1.5}),
        json.dumps(GOOD | {"parameters": 10**30}),
    ],
)
def test_damaged_costs_are_dropped_with_a_warning(row, caplog, text):
    found = row(text)
    assert found["miou"] == 0.5 and {found[key] for key in ("parameters", "trainable", "memory_gib", "seconds")} == {
        None
    }
    assert "cost.json is damaged" in caplog.text and "costs are left out" in caplog.text
