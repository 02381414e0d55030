"""What of a config kept features depend on: a change is told, or makes other views; a learning rate is neither."""

from types import SimpleNamespace

import pytest

from dinoseg.experiment.builder import Builder
from dinoseg.tasks import images
from dinoseg.tasks.images import ImageTask
from dinoseg.utils.errors import UserError


@pytest.fixture
def plan(compose, monkeypatch):
    """Return a function that gives the plan of a config."""
    monkeypatch.setattr(images, "has_frozen_part", lambda model, engine: True)
    monkeypatch.setattr(
        images, "feature_cache", lambda data_module, model, engine, plan: SimpleNamespace(plan=plan, place=None)
    )

    def plan_cache(*words, before=None):
        cfg = compose("data.root=.", "data.classes=[a,b]", "backbone=tiny", "data.views=2", *words)
        task = SimpleNamespace(parts=Builder(cfg), data_module=SimpleNamespace())
        ImageTask.cache_features(task, None, None, 3.0, before=before or {})
        return task.data_module.cache.plan

    return plan_cache


def test_feature_cache_key_depends_on_the_relevant_settings(plan):
    first = plan()
    rates = plan("head.lr=1", "optim.optimizer.lr=1")
    assert (rates.parts, rates.drawing) == (first.parts, first.drawing)
    assert plan("adapter=last_blocks", "adapter.lr=1").parts == plan("adapter=last_blocks").parts
    for word, part in (("backbone.patch_size=8", "backbone"), ("adapter=last_blocks", "adapter"), ("head=mlp", "head")):
        other = plan(word)
        assert [name for name in first.parts if other.parts[name] != first.parts[name]] == [part]
        assert other.drawing == first.drawing
    deeper = plan("head.layers=[0]")  # which are what the backbone gives
    assert deeper.parts["backbone"] != first.parts["backbone"]
    for word in ("data.augment.flip=0.1", "resolution.crop=[32,32]", "resolution.longest=999"):
        assert plan(word).drawing != first.drawing


def test_keys_of_features_reach_them(plan):
    found = plan("features.dtype=int8", "features.gib=3", before={"engine.cache": "disk"})
    assert (found.dtype, found.gib, found.epochs, found.before) == ("int8", 3, 3.0, "disk")


def test_resumed_run_preserves_the_dtype_of_its_features(plan):
    assert plan().dtype == "float16" == plan(before={}).dtype
    kept = {"engine.cache": "disk", "features.dtype": "float32"}
    assert plan(before=kept).dtype == "float32" and plan("features.dtype=int8", before=kept).dtype == "int8"
    assert plan(before={"engine.cache": "off", "features.dtype": None}).dtype == "float32"  # the same numbers as live
    with pytest.raises(UserError, match="features.dtype"):
        plan(before=kept | {"features.dtype": "of somebody"})
