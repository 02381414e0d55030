import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """Return a runner of scripts by name: exit status, rows by name, what is printed."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import run  # type: ignore[import-not-found]

    for name, code in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(TELL.format(folder=str(FOLDER)) + code)
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)

    def ran(names, *words):
        monkeypatch.setattr(sys, "argv", ["benchmarks/run.py", "--only", *names, *words])
        status = run.main({name: run.Benchmark(f"{name}.py") for name in SCRIPTS})
        written = json.loads((tmp_path / "ratios.json").read_text())
        return status, written["rows"], capsys.readouterr()

    return ran


def test_ratios_stand_in_one_table_with_their_references(table):
    status, rows, said = table(["good", "skips"])
    assert status == 0
    assert [(row["name"], row["ratio"], row["needed"], row["verdict"]) for row in rows] == [
        *(("good", 2.5, 2.0, ""), ("good", 0.5, None, "")),
        ("skips", None, None, "skipped"),
    ]
    assert all(text in said.out for text in ("by hand", "2.50", "sum, memory", "pip install other", "run.py --only"))


def test_score_below_its_promise_exits_with_status_1(table):
    status, rows, said = table(["below", "good"])
    assert status == 1 and [row["verdict"] for row in rows] == ["BELOW", "", ""] and "BELOW" in said.out
    assert table(["below"], "--quick")[0] == 0


@pytest.mark.parametrize(("name", "why"), [("stops", "ValueError: no more"), ("silent", "nothing"), ("killed", "-9")])
def test_a_script_that_fails_loses_no_other_row(table, name, why):
    status, rows, said = table([name, "good"], "--quick")
    assert status == 1
    assert [row["verdict"] for row in rows][-3:] == ["FAILED", "", ""]
    assert why in rows[-3]["skipped"] and rows[-2]["ratio"] == 2.5 and "it said" in said.err


def test_every_script_of_the_table_is_there_and_names_its_words(table):
    import run

    for name, benchmark in run.BENCHMARKS.items():
        text = (FOLDER / benchmark.script).read_text()
        given = [word for word in f"{benchmark.words} {benchmark.quick}".split() if word.startswith("--")]
        assert "tell(" in text and all(f'"{word}"' in text for word in given), name


@pytest.mark.heavy
def test_a_script_runs_at_tiny_sizes(tmp_path):
    done = subprocess.run(
        [sys.executable, FOLDER / "run.py", "--quick", "--only", "loss"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "ratios.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {"loss"} and all(row["ratio"] >= 0 for row in rows)


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda script: script.stem)
def test_benchmark_scripts_import_existing_names(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dinoseg":
            exec(ast.unparse(node))
