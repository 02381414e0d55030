"""A head and a tracker from a package and a config folder outside the repository."""

import json
import sys

import numpy as np
import pytest
from command_line import SLOTS, SMALL, call, write_data

from dinoseg.modes.help import help_for
from dinoseg.utils.images import read_ids

HEAD = """
from dinoseg.models.heads.linear import LinearHead

class MyHead(LinearHead):
    pass
"""
CONFIG = "defaults: [linear, _self_]\n_target_: my_parts.heads.MyHead\n"


TRACKER = """
import numpy as np
from dinoseg.tracking.tracker import Tracker

class ShiftTracker(Tracker):
    def __init__(self, model, *, shift, **options):
        super().__init__(**options)
        self.kind, self.shift, self.last = type(model).__name__, shift, None

    @property
    def settings(self):
        return {"kind": self.kind, "shift": self.shift, "batch_size": self.batch_size}

    def track_batch(self, frames, labels):
        return [self.next_mask(frame, mask) for frame, mask in zip(frames, labels)]

    def next_mask(self, frame, mask):
        first = np.eye(*frame.shape[:2], dtype=np.uint8) if mask is None and self.last is None else mask
        self.last = np.roll(self.last, self.shift, axis=1) if first is None else first
        return self.last.copy()

    def state(self):
        return {}

    def load(self, state):
        pass
"""
TRACKER_CONFIG = "_target_: my_parts.trackers.ShiftTracker\n_partial_: true\nshift: 1\n"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a package and a config folder outside the repository; return the words that name the folder."""
    monkeypatch.syspath_prepend(tmp_path / "mine")
    for name, text in {
        "my_parts/__init__.py": "",
        "my_parts/heads.py": HEAD,
        "my_parts/trackers.py": TRACKER,
        "config/head/my_head.yaml": CONFIG,
        "config/tracker/mine.yaml": TRACKER_CONFIG,
        "config/slots/mine.yaml": TRACKER_CONFIG,
        "config/tracker/whole.yaml": TRACKER_CONFIG.replace("_partial_: true\n", ""),
        "config/tracker/foreign.yaml": "_target_: types.SimpleNamespace\n",
    }.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    yield ("--config-dir", str(tmp_path / "mine/config"))
    for name in [name for name in sys.modules if name.startswith("my_parts")]:
        monkeypatch.delitem(sys.modules, name)


def test_own_parts_are_listed_trained_and_evaluated(tmp_path, own):
    assert " my_head " in help_for([*own, "--help"]) and " my_head " not in help_for(["--help"])
    write_data(tmp_path / "data")
    words = ("mode=train", *SMALL, "head=my_head", "hydra.run.dir=run", "mode.metrics_only=true")
    path = f"hydra.searchpath=[file://{tmp_path}/mine/config]"
    assert call(tmp_path, path, *words).status == 0
    evaluate = ("mode=eval", "resume=run", "engine=cpu", "engine.workers=0")
    refused = call(tmp_path, *evaluate)
    assert refused.status == 1 and "add the --config-dir DIR (or hydra.searchpath) of its training" in refused.err
    assert call(tmp_path, *own, *evaluate).status == 0


TRACK = ("mode=track", "input=clip", "engine=cpu", "mode.batch_size=3")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("tracker=mine", "labels=first.png", "backbone=rgb"), "RgbBackbone"),
        (("tracker=mine", "resume=segmenter"), "Segmenter"),
        (("slots=mine", "resume=slots", "labels=first.png"), "Segmenter"),
    ],
)
def test_an_own_tracker_tracks_with_a_backbone_and_with_trained_models(trained, own, tmp_path, words, kind):
    done = call(trained, *own, *TRACK, *words, f"{words[0].partition('=')[0]}.shift=2", f"hydra.run.dir={tmp_path}/out")
    assert done.status == 0, done.err
    settings = json.loads((tmp_path / "out/track.json").read_text())["settings"]
    assert settings == {"kind": kind, "shift": 2, "batch_size": 3}
    masks = [read_ids(path) for path in sorted((tmp_path / "out/masks").iterdir())]
    assert len(masks) == 7
    if "labels=first.png" in words:
        np.testing.assert_array_equal(masks[0], read_ids(trained / "first.png"))
    for number, mask in enumerate(masks):
        np.testing.assert_array_equal(mask, np.roll(masks[0], 2 * number, axis=1))


def test_an_own_tracker_is_evaluated(trained, own, tmp_path):
    words = ("mode=eval", "data=movi", "data.root=movi", "backbone=rgb", "engine=cpu", "tracker=mine")
    done = call(trained, *own, *words, f"hydra.run.dir={tmp_path}/out")
    assert done.status == 0 and "FG-ARI" in done.out, done.err
    recorded = json.loads((tmp_path / "out/tracking.json").read_text())
    assert recorded["tracker"]["kind"] == "RgbBackbone" and recorded["given"] == "first"
    assert (tmp_path / "out/scores.json").is_file()


def test_an_own_tracker_of_slots_validates_a_training(trained, own, tmp_path):
    words = ("slots=mine", "trainer.steps=1", "trainer.val_every=1", "mode.metrics_only=true")
    done = call(trained, *own, *SLOTS, *words, f"hydra.run.dir={tmp_path}/out")
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "out/evaluation/tracking.json").read_text())["tracker"]["shift"] == 1


def test_what_makes_no_trackers_is_refused(trained, own):
    remedy = "Set its `_target_` to a class that inherits from dinoseg.tracking.tracker.Tracker, and `_partial_: true`"
    backbone = ("labels=first.png", "backbone=rgb")
    for words, message in (
        ((*backbone, "tracker=whole"), "tracker=whole cannot be instantiated (ShiftTracker.__init__() missing 1 re"),
        ((*backbone, "tracker=whole"), remedy),
        (
            (*backbone, "tracker=foreign"),
            f"tracker=foreign returns SimpleNamespace, which does not create trackers. {remedy}",
        ),
        (("resume=segmenter", "tracker=mine", "mode.smoothing=0.3"), "mode.smoothing=0.3: tracker=mine takes no"),
    ):
        done = call(trained, *own, *TRACK, *words)
        assert done.status == 1 and message in done.err and "Traceback" not in done.err, done.err
