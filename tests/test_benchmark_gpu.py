import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run_script(tmp_path, monkeypatch, capsys):
    """Return a runner of the script: its rows, and what it prints."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu  # type: ignore[import-not-found]

    def run(*words):
        monkeypatch.setenv("DINOSEG_BENCHMARK_ROWS", str(tmp_path / "rows"))
        monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", *words])
        gpu.main()
        return [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()], capsys.readouterr().out

    return run


def test_missing_accelerator_is_reported(run_script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,), said = run_script()
    assert row["ratio"] is None and row["skipped"].startswith("no CUDA device is here")
    assert said.startswith("Not measured: no CUDA device is here")


@pytest.mark.heavy
def test_gpu_benchmark_runs_on_a_processor_at_tiny_sizes(run_script):
    rows, said = run_script("--tiny")
    assert len(rows) == 6 and all(row["ratio"] > 0 for row in rows)
    assert [row["what"] for row in rows[:4]] == [
        f"vits16, 32 x 48, {task}, bfloat16, images/s" for task in ("inference", "frozen", "lora", "full")
    ]
    table = [line.split() for line in said.splitlines() if line.startswith("vits16")]
    assert len(table) == 8 and all(float(line[-3]) > 0 and 0 < float(line[-2]) < 100 for line in table)
    assert "TFLOP/s of matrix products" in said and "blocks recomputed" in said
