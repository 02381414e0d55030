"""Keys of image trainings: cached features, and images and videos without masks."""

from types import SimpleNamespace

import numpy as np
import pytest
from films import write_film
from mistakes import assert_refused

from dinoseg.experiment.builder import Builder
from dinoseg.extensions.distillation.unmasked import _seconds, list_images
from dinoseg.extensions.feature_cache import cached_features
from dinoseg.extensions.video.access import VideoFrame
from dinoseg.methods.images import ImageTraining
from dinoseg.utils.images import write_png

GREY = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture
def plan(compose, monkeypatch):
    """Return a function that gives the plan of a config."""
    monkeypatch.setattr(cached_features, "has_frozen_part", lambda model, engine: True)
    monkeypatch.setattr(cached_features, "feature_cache", lambda *parts: SimpleNamespace(plan=parts[-1], place="disk"))

    def plan_cache(*words, before=None):
        cfg = compose("data.root=.", "data.classes=[a,b]", "backbone=tiny", "data.views=2", *words)
        training = ImageTraining(Builder(cfg))
        training.data_module, training.settings = SimpleNamespace(epoch=2.0), SimpleNamespace(steps=3, accumulate=2)
        training.model = training.engine = None
        training.start = before and SimpleNamespace(info={"engine": before})
        training.cache_features()
        return training.data_module.cache.plan

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


def test_resumed_run_preserves_the_dtype_of_its_features(plan):
    found = plan("features.dtype=int8", "features.gib=3", before={"engine.cache": "disk"})
    assert (found.dtype, found.gib, found.epochs, found.previous) == ("int8", 3, 3.0, "disk")
    assert plan().dtype == "float16" == plan(before={}).dtype
    kept = {"engine.cache": "disk", "features.dtype": "float32"}
    assert plan(before=kept).dtype == "float32" and plan("features.dtype=int8", before=kept).dtype == "int8"
    assert plan(before={"engine.cache": "off", "features.dtype": None}).dtype == "float32"  # the same numbers as live
    assert_refused(lambda: plan(before=kept | {"features.dtype": "of somebody"}), "features.dtype")


def test_frames_are_the_first_of_each_step(tmp_path):
    film = write_film(tmp_path / "a.mp4", frames=30)  # 24000 / 1001 frames a second
    images = list_images(str(film), every=0.5, cache_dir=tmp_path / "c")
    assert [each.name for each in images] == ["000000000", "000000012", "000000024"]
    assert images[1].source == VideoFrame(film, 12)
    assert len(list_images(str(film), every=0.01, cache_dir=tmp_path / "c")) == 30
    even = write_film(tmp_path / "b.mp4", frames=12, rate=10)  # 0.7 / 0.1 is less than 7
    assert len(list_images(str(even), every=0.1, cache_dir=tmp_path / "c")) == 12


def test_uneven_video_is_sampled_by_its_own_times(tmp_path):
    film = write_film(tmp_path / "a.mp4", frames=4, times=[0, 3000, 180000, 183000])  # 0, 1/30, 2, 2 1/30 s
    images = list_images(str(film), every=1.0, cache_dir=tmp_path / "c")
    assert [each.name for each in images] == ["000000000", "000000002"]


def test_images_and_videos_of_a_folder_keep_their_names(tmp_path):
    write_png(tmp_path / "x10.png", GREY)
    write_png(tmp_path / "x2.png", GREY)
    write_film(tmp_path / "y.mp4", frames=3)
    (tmp_path / "notes.txt").write_text("")
    images = list_images(str(tmp_path), every=1.0, cache_dir=tmp_path / "c")
    assert [each.name for each in images] == ["x2", "x10", "y/000000000"]


@pytest.mark.parametrize(("fps", "step"), [(10.0, 0.1), (0.0, 0.04), (90000.0, 0.04)])
def test_frames_without_valid_times_are_evenly_spaced(fps, step):
    class Index:
        times = np.array([0.0, 40.0, 40.0])

        def __len__(self):
            return 3

    Index.fps = fps
    assert _seconds(Index()) == pytest.approx([0, step, 2 * step])


def test_installation_without_a_feature_cache_trains_on_images(compose):
    words = ("data.root=.", "data.classes=[a,b]", "backbone=tiny", "data.views=2", "features=null")
    training = ImageTraining(Builder(compose(*words)))
    training.engine = SimpleNamespace(cache="auto")
    assert training.cache_features() == {}
    training.engine.cache = "disk"
    assert_refused(training.cache_features, "engine.cache=disk")
