"""The notebooks of examples/: they run, and their committed outputs are complete, portable and small."""

import re

import pytest
from docs_pages import ROOT

nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt|var|private)/|\b[A-Z]:\\\\|site-packages")
MAX_BYTES = 300_000
SMALLER = {  # what the notebooks compute for minutes -> for seconds
    "range(32)": "range(8)",
    "range(100, 112)": "range(100, 104)",
    "range(150)": "range(50)",
    "range(24)": "range(8)",
    "range(128)": "range(8)",
    "range(1000, 1016)": "range(1000, 1004)",
    '"steps": 500, "val_every": 100': '"steps": 4, "val_every": 2',
    '"steps": 120, "val_every": 60': '"steps": 4, "val_every": 2',
}
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def problems(cells):
    """Return what is wrong with committed cells: their order, errors, and paths of the machine that ran them."""
    counts = [cell.execution_count for cell in cells]
    found = [] if counts == [*range(1, len(cells) + 1)] else [f"not executed in order: {counts}"]
    outputs = [output for cell in cells for output in cell.outputs]
    found += [f"error: {output.ename}" for output in outputs if output.output_type == "error"]
    return found + [f"path: {output}" for output in outputs if MACHINE_PATH.search(str(output))]


def test_there_are_five_and_the_contents_list_them():
    contents = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 5
    assert [path.name for path in NOTEBOOKS if f"examples/{path.name}" not in contents] == []


@notebooks
def test_committed_outputs_are_complete_portable_and_small(path):
    cells = code_cells(path)
    assert problems(cells) == [] and path.stat().st_size < MAX_BYTES
    assert any("image/" in key for cell in cells for output in cell.outputs for key in output.get("data", {}))


@notebooks
def test_lines_have_at_most_120_characters_and_links_exist(path):
    cells = nbformat.read(path, as_version=4).cells
    assert [line for cell in cells for line in cell.source.splitlines() if len(line) > 120] == []
    links = [link for cell in cells for link in re.findall(r"\]\(([^)#]+)", cell.source)]
    assert links and all((path.parent / link).is_file() for link in links)


@pytest.mark.parametrize(
    ("count", "text"), [(2, "fine"), (None, "fine"), (1, "/home/someone/run"), (1, "C:\\\\Users\\\\run"), (1, "/tmp/a")]
)
def test_problems_are_found(count, text):
    output = nbformat.v4.new_output("stream", text=text)
    assert problems([nbformat.v4.new_code_cell("1", execution_count=count, outputs=[output])])
    good = nbformat.v4.new_output("stream", text="run/evaluation/report.html, 1/2, a/tmp/b")
    assert problems([nbformat.v4.new_code_cell("1", execution_count=1, outputs=[good])]) == []


def test_replaced_sizes_are_those_of_a_notebook():
    sources = [cell.source for path in NOTEBOOKS for cell in code_cells(path)]
    assert [whole for whole in SMALLER if not any(whole in source for source in sources)] == []


@notebooks
def test_a_notebook_may_run_again_in_its_folder(path):
    calls = [cell.source for cell in code_cells(path) if "out_dir=" in cell.source]
    assert [source for source in calls if source.count("out_dir=") != source.count("exist_ok=True")] == []


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@notebooks
def test_a_notebook_runs(path, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for whole, small in SMALLER.items():
            cell.source = cell.source.replace(whole, small)
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3").execute(cwd=str(tmp_path))
    assert problems([cell for cell in notebook.cells if cell.cell_type == "code"]) == []
