"""The scripts of benchmarks/: their tables, what they measure, and that both sides do the same work."""

import ast
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from scipy import stats

import dinoseg
from dinoseg.evaluation.scoring.intervals import leave_one_out
from dinoseg.evaluation.unit_scores import ClassScores

FOLDER = Path(__file__).parents[1] / "benchmarks"
TELL = "import sys; sys.path.insert(0, {folder!r}); from rows import Row, tell\n"
SCRIPTS = {
    "good": "tell(Row('sum, time', 'by hand', 2.5, 2.0), Row('sum, memory', 'by hand', 0.5))",
    "below": "tell(Row('product, time', 'by hand', 1.5, 2.0)); sys.exit(1)",
    "skips": "tell(Row('J&F, time', 'other', None, skipped='other is not installed: pip install other'))",
    "stops": "tell(Row('first, time', 'by hand', 3.0)); raise ValueError('no more')",
    "silent": "",
    "killed": "import os; tell(Row('a', 'b', 9.0)); os.kill(os.getpid(), 9)",
}


@pytest.fixture(autouse=True)
def scripts_are_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """Return a runner of scripts by name: exit status, rows by name, what is printed."""
    import run  # type: ignore[import-not-found]

    for name, code in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(TELL.format(folder=str(FOLDER)) + code)
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)

    def ran(names, *words):
        monkeypatch.setattr(sys, "argv", ["benchmarks/run.py", "--only", *names, *words])
        status = run.main({name: run.Benchmark(f"{name}.py") for name in SCRIPTS})
        return status, json.loads((tmp_path / "ratios.json").read_text())["rows"], capsys.readouterr()

    return ran


def test_ratios_stand_in_one_table_with_their_references(table):
    status, rows, said = table(["good", "skips", "below"])
    assert status == 1
    assert [(row["name"], row["ratio"], row["needed"], row["verdict"]) for row in rows] == [
        *(("good", 2.5, 2.0, ""), ("good", 0.5, None, "")),
        *(("skips", None, None, "skipped"), ("below", 1.5, 2.0, "BELOW")),
    ]
    words = ("by hand", "2.50", "sum, memory", "pip install other", "run.py --only", "BELOW")
    assert all(text in said.out for text in words)


def test_only_a_score_below_its_promise_exits_with_status_1(table):
    assert table(["good", "skips"])[0] == 0
    assert table(["below"], "--quick")[0] == 0


@pytest.mark.parametrize(("name", "why"), [("stops", "ValueError: no more"), ("silent", "nothing"), ("killed", "-9")])
def test_a_script_that_fails_loses_no_other_row(table, name, why):
    status, rows, said = table([name, "good"], "--quick")
    assert status == 1
    assert [row["verdict"] for row in rows][-3:] == ["FAILED", "", ""]
    assert why in rows[-3]["skipped"] and rows[-2]["ratio"] == 2.5 and "it said" in said.err


def test_every_script_of_the_table_is_there_and_names_its_words():
    import run

    for name, benchmark in run.BENCHMARKS.items():
        text = (FOLDER / benchmark.script).read_text()
        given = [word for word in f"{benchmark.words} {benchmark.quick}".split() if word.startswith("--")]
        assert "tell(" in text and all(f'"{word}"' in text for word in given), name


@pytest.mark.heavy
def test_a_script_runs_at_tiny_sizes(tmp_path):
    command = [sys.executable, FOLDER / "run.py", "--quick", "--only", "loss"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "ratios.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {"loss"} and all(row["ratio"] >= 0 for row in rows)


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda script: script.stem)
def test_benchmark_scripts_import_existing_names(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dinoseg":
            exec(ast.unparse(node))


@pytest.fixture
def run_gpu(tmp_path, monkeypatch, capsys):
    """Return a runner of the script for GPUs: its rows, and what it prints."""
    import gpu  # type: ignore[import-not-found]

    def run(*words):
        monkeypatch.setenv("DINOSEG_BENCHMARK_ROWS", str(tmp_path / "rows"))
        monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", *words])
        gpu.main()
        return [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()], capsys.readouterr().out

    return run


def test_missing_accelerator_is_reported(run_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,), said = run_gpu()
    assert row["ratio"] is None and row["skipped"].startswith("no CUDA device is here")
    assert said.startswith("Not measured: no CUDA device is here")


@pytest.mark.heavy
def test_gpu_benchmark_runs_on_a_processor_at_tiny_sizes(run_gpu):
    rows, said = run_gpu("--tiny")
    assert len(rows) == 6 and all(row["ratio"] > 0 for row in rows)
    assert [row["what"] for row in rows[:4]] == [
        f"vits16, 32 x 48, {task}, bfloat16, images/s" for task in ("inference", "frozen", "lora", "full")
    ]
    table = [line.split() for line in said.splitlines() if line.startswith("vits16")]
    assert len(table) == 8 and all(float(line[-3]) > 0 and 0 < float(line[-2]) < 100 for line in table)
    assert "TFLOP/s of matrix products" in said and "blocks recomputed" in said


def test_lightly_train_takes_a_step_for_each_batch(monkeypatch):
    import end_to_end  # type: ignore[import-not-found]

    stand_in = MagicMock()
    for name in ("lightly_train", "lightly_train._models"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    end_to_end.by_lightly(Namespace(camvid=Path("data"), batch=4, size=(32, 48)), 2, "head", "fp32")
    given = stand_in.train_semantic_segmentation.call_args.kwargs
    assert given["batch_size"] == 4 and given["gradient_accumulation_steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "adapter", "imports"),
    [("tiny", "lora", ("transformers", "peft")), ("timm", "frozen", ("timm",)), ("rgb", "frozen", ())],
)
def test_load_time_imports_the_libraries_of_the_file(backbone, adapter, imports, tmp_path):
    import load_time  # type: ignore[import-not-found]

    keys = {"weights": "random", "backbone.name": "test_vit"} if backbone == "timm" else {}
    dinoseg.create_model(backbone, adapter=adapter, num_classes=2, **keys).save(tmp_path / "model.safetensors")
    found = load_time.imports_of(tmp_path / "model.safetensors")
    assert all((name in found) == (name in imports) for name in ("transformers", "timm", "peft"))


@pytest.fixture
def coverage(scripts_are_modules):
    import interval_coverage  # type: ignore[import-not-found]

    return interval_coverage


@pytest.mark.parametrize("units", [4, 12, 40])
def test_bca_is_scipys_on_the_same_draws(coverage, units):
    population = coverage.drawn_population(np.random.default_rng(units), 200)
    sums = population.sums[:units, :18]
    kind = ClassScores(6)

    def miou(places, axis=-1):
        return kind.scores(sums[places.astype(int)].sum(axis=-2))["miou"]

    places = np.arange(units, dtype=float)
    options = {"vectorized": True, "method": "BCa", "batch": 1}
    reference = stats.bootstrap((places,), miou, n_resamples=999, rng=np.random.default_rng(1), **options)
    left_out = leave_one_out(kind, sums)["miou"]
    value = float(kind.scores(sums.sum(axis=0))["miou"])
    found = coverage.bca_limits(reference.bootstrap_distribution, value, left_out)
    assert found == pytest.approx([*reference.confidence_interval], abs=1e-12)
    options = {"n_resamples": 0, "bootstrap_result": reference, "method": "percentile"}
    plain = stats.bootstrap((places,), miou, **options).confidence_interval
    assert coverage.percentile_limits(reference.bootstrap_distribution) == pytest.approx([*plain], abs=1e-12)


def test_a_table_of_intervals_comes_without_data(coverage, monkeypatch, capsys):
    monkeypatch.setattr(coverage, "UNITS", (5, 20))
    monkeypatch.setattr(coverage, "DRAWS", 20)
    monkeypatch.setattr(sys, "argv", ["interval_coverage.py", "--simulations", "4"])
    coverage.main()
    said = capsys.readouterr().out
    assert all(said.count(f"| {method} ") == 3 for method in coverage.METHODS) and "seeds left out" in said
