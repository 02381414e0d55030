"""The public names of `import dinoseg`: documented with examples that run, visible to editors, and cheap to import."""

import ast
import doctest
import inspect
import re
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest
from docs_pages import ROOT
from docs_stand_ins import CPU, SHORT, SMALL

import dinoseg
from dinoseg.api import modes, runs
from dinoseg.api.compose import read_call, words_of
from dinoseg.api.jobs import run_mode
from dinoseg.extensions.prepare import sarrarp
from dinoseg.extensions.rendering.surgery.write import render_dataset

OF_RUNS = ("Comparison", "Run", "Scores", "compare", "evaluate", "export_onnx", "predict", "score", "train")
UNDOCUMENTED = ("__version__", "losses", "metrics", "testing")  # a text, and packages whose names are documented
PUBLIC = [
    *((dinoseg, name) for name in dinoseg.__all__ if name not in UNDOCUMENTED),
    *((package, name) for package in (dinoseg.losses, dinoseg.metrics, dinoseg.testing) for name in package.__all__),
]


@pytest.mark.parametrize(
    ("used", "absent"),
    [
        ("dinoseg.losses, dinoseg.metrics", {"torch", "hydra", "omegaconf", "numpy", "PIL", "yaml"}),
        ("dinoseg; dinoseg.UserError; dinoseg.list_heads()", {"torch"}),
    ],
)
def test_import_is_cheap(used, absent):
    code = f"import sys, dinoseg, {used}; print({absent} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("package", [dinoseg, dinoseg.losses, dinoseg.metrics], ids=lambda each: each.__name__)
def test_names_are_listed_and_seen_by_editors(package):
    source = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in source.body if isinstance(node, ast.If)]
    seen = [alias.name for node in ast.walk(blocks[0]) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(seen) == sorted({*package.__all__} - {"__version__"})
    assert {*package.__all__} <= {*dir(package)} and package.__all__ == sorted(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'create_modle'"):
        package.create_modle  # noqa: B018


def test_package_docstring_lists_every_public_name():
    for name in {*dinoseg.__all__} - {"__version__", "Segmentation", "SegmentationDataset"}:
        assert name in dinoseg.__doc__, name


def test_each_name_has_a_docstring_and_is_once_on_the_api_page():
    entries = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(entries) == sorted(f"{package.__name__}.{name}" for package, name in PUBLIC)
    for package, name in PUBLIC:
        text = inspect.getdoc(getattr(package, name))
        assert text and text[0].isupper() and text.splitlines()[0].endswith(".") and "Examples:" in text, name


def run_small(mode, words, overrides, *options, **named):
    """Run a mode with a small model on a CPU, without its output."""
    small = {"train": (*SMALL, *SHORT, *CPU, "mode.metrics_only=true"), "score": (), "compare": ()}
    words = [*words, *words_of(*read_call((), overrides)[:2]), *small.get(mode, CPU)]
    with redirect_stdout(StringIO()):
        return run_mode(mode, words, {}, *options, **named)


@cache
def failures(package, name):
    """Run the example of a public name once, in the current folder, and return what differs from its output."""
    value = getattr(package, name)
    found = []
    tests = doctest.DocTestFinder(recurse=False).find(value, name, module=import_module(value.__module__), globs={})
    assert tests and tests[0].examples
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(tests[0], out=found.append)
    return "".join(found)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Enter a folder with the dataset that `make demo` writes, smaller."""
    folder = tmp_path_factory.mktemp("demo")
    data = folder / "outputs/demo/data"
    render_dataset(data, train_videos=3, test_videos=0, seconds=4, size=(48, 64), workers=1)
    sarrarp.prepare(data, workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TMPDIR", str(folder))
        for module in (modes, runs):
            patch.setattr(module, "run_mode", run_small)
        yield


@pytest.fixture(scope="module")
def demo_runs(demo):
    """Write the results that examples leave for others."""
    for name in ("train", "evaluate", "predict"):
        failures(dinoseg, name)


@pytest.mark.heavy
@pytest.mark.parametrize("name", OF_RUNS)
def test_examples_of_runs_run(name, demo_runs):
    assert not failures(dinoseg, name)


EXAMPLES = [pytest.param(*each, id=each[1]) for each in PUBLIC if each[1] not in OF_RUNS]


@pytest.mark.slow
@pytest.mark.parametrize(("package", "name"), EXAMPLES)
def test_a_public_name_has_a_docstring_with_an_example_that_runs(package, name, demo):
    assert not failures(package, name)
