"""Benchmarks against other libraries do the same work on both sides."""

import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

import dinoseg

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def lightly_train(monkeypatch):
    """Stand for LightlyTrain, and return the keyword arguments that its training gets."""
    given = {}
    names = ("lightly_train", "lightly_train._models", "lightly_train._models.package_helpers")
    modules = {name: ModuleType(name) for name in names}
    modules[names[0]].train_semantic_segmentation = lambda **keywords: given.update(keywords)
    modules[names[1]].package_helpers = modules[names[2]]
    modules[names[2]].get_wrapped_model = None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return given


def test_lightly_train_takes_a_step_for_each_batch(lightly_train, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import end_to_end  # type: ignore[import-not-found]

    end_to_end.by_lightly(Namespace(camvid=Path("data"), batch=4, size=(32, 48)), 2, "head", "fp32")
    assert lightly_train["batch_size"] == 4 and lightly_train["gradient_accumulation_steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "adapter", "imports"),
    [("tiny", "lora", ("transformers", "peft")), ("timm", "frozen", ("timm",)), ("rgb", "frozen", ())],
)
def test_load_time_imports_the_libraries_of_the_file(backbone, adapter, imports, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import load_time  # type: ignore[import-not-found]

    keys = {"weights": "random", "backbone.name": "test_vit"} if backbone == "timm" else {}
    dinoseg.create_model(backbone, adapter=adapter, num_classes=2, **keys).save(tmp_path / "model.safetensors")
    found = load_time.imports_of(tmp_path / "model.safetensors")
    assert all((name in found) == (name in imports) for name in ("transformers", "timm", "peft"))
