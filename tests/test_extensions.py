"""The core imports no extension, and each extension can be deleted."""

import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from command_line import write_data
from extensions import (
    EXTENSIONS,
    config_files,
    copy_without,
    edges_into_extensions,
    extension_of,
    extensions_of_config,
    imported_with,
    imports_of,
    modules,
    needed_by,
    statements,
)

TESTS = Path(__file__).parent
CORE_CONFIGS = (  # what a first training, evaluation and prediction compose
    *("main", "hydra/run", "mode/train", "mode/eval", "mode/predict", "mode/help", "hparam/base", "data/folder"),
    *("data/cityscapes", "data/ade20k", "data/pascal_voc", "backbone/dinov2_vits14", "adapter/lora", "head/linear"),
    *("loss/cross_entropy", "optim/adamw", "trainer/supervised", "inference/auto", "engine/auto", "task/semantic"),
    *("logger/tensorboard", "metric/boundary_iou", "export/safetensors"),
)
MAX_TRAINING_STATEMENTS = 9_900  # statements that `modes/train.py` imports


def test_the_table_names_the_extensions_and_has_no_circles():
    assert {*EXTENSIONS} == {extension_of(name) for name in modules()} - {None}
    TopologicalSorter({name: extension.needs for name, extension in EXTENSIONS.items()}).prepare()
    assert all({*extension.needs} <= EXTENSIONS.keys() for extension in EXTENSIONS.values())
    assert all({*extension.configs} <= config_files().keys() for extension in EXTENSIONS.values())


def test_the_core_imports_no_extension():
    found = edges_into_extensions()
    assert not found, "\n".join(f"{name} imports {other} ({extension_of(other)})" for name, other in sorted(found))


def test_the_core_knows_no_slots():
    core = [(name, path.read_text("utf-8")) for name, path in modules().items() if extension_of(name) is None]
    lines = [(name, line) for name, text in core for line in text.splitlines() if re.search("(?i)slot", line)]
    known = [(name, line.partition("  #")[0]) for name, line in lines]
    # a file could choose any group if it named those that its checkpoint stores
    assert known == [("training.description", 'FOLLOWING = "slots"')]


def test_extensions_import_only_those_that_they_list():
    wanted = {
        (extension_of(name), other, f"{name} imports {module}")
        for name in modules()
        for module in imports_of(name)
        if (other := extension_of(module)) and extension_of(name) not in (None, other)
    }
    unlisted = [text for own, other, text in wanted if own and other not in EXTENSIONS[own].needs]
    assert not unlisted, "\n".join(sorted(unlisted))
    unused = {(own, need) for own, each in EXTENSIONS.items() for need in each.needs}
    assert unused <= {(own, other) for own, other, _ in wanted}


def test_configs_of_the_core_require_no_extension():
    assert {name: extensions_of_config(name) for name in CORE_CONFIGS if extensions_of_config(name)} == {}


def test_a_training_imports_no_extension():
    found = imported_with("modes.train", lazy=True)
    assert not {name: extension_of(name) for name in found if extension_of(name)}
    assert sum(map(statements, imported_with("modes.train"))) <= MAX_TRAINING_STATEMENTS


def use_copy(folder, gone, *words):
    """Run `one_copy.py` on a copy of the package without some extensions; return what it printed."""
    copy_without(gone, folder)
    write_data(folder / "data")
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(TESTS / "one_copy.py"), str(folder), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.heavy
def test_the_core_alone_trains_evaluates_predicts_and_loads(tmp_path):
    out = use_copy(tmp_path, {*EXTENSIONS}, "all")
    assert "mIoU" in out and "written to" not in out


@pytest.mark.heavy
@pytest.mark.parametrize("name", sorted(EXTENSIONS))
def test_an_extension_can_be_deleted(tmp_path, name):
    use_copy(tmp_path, needed_by(name))
