"""Objects of a video in the app: drawn by their ids, and counted by class."""

from types import SimpleNamespace

import numpy as np

from dinoseg.extensions.serving import source
from dinoseg.extensions.serving.video import FollowedObjects
from dinoseg.extensions.tracking.tracker import TrackedObject
from dinoseg.report.palette import default_palette


class Tracker:
    def tracked_objects(self):
        return {1: TrackedObject(2, 0.9), 7: TrackedObject(2, 0.8), 3: TrackedObject(1, 0.7)}


def test_objects_keep_their_colours_while_others_vanish():
    mask = np.zeros((90, 120), np.uint8)
    mask[5:40, 5:50] = 1
    mask[50:85, 60:110] = 7
    frame = np.full((90, 120, 3), 100, np.uint8)
    followed = FollowedObjects(lambda frames: [mask] * len(frames), Tracker(), [(9, 9, 9)] * 3, opacity=1)
    assert len(followed.segment([frame] * 2)) == 2
    drawn = followed.draw(frame, mask)
    alone = followed.draw(frame, np.where(mask == 7, mask, 0))
    assert tuple(drawn[8, 8]) == default_palette(256)[1]
    assert tuple(drawn[52, 62]) == tuple(alone[52, 62]) == default_palette(256)[7]
    np.testing.assert_array_equal(alone[45:], drawn[45:])  # its number too
    pixels, numbers = followed.count_classes(np.bincount(mask.ravel(), minlength=256))
    assert pixels[2] == 35 * 95 and pixels[1] == 0 and dict(numbers) == {2: 2, 1: 1}


def test_app_follows_objects_of_its_least_score(monkeypatch):
    predictor = SimpleNamespace(model=SimpleNamespace(backbone="backbone"), device="cpu", autocast=None)
    monkeypatch.setattr(source, "_find_predictor", lambda _: predictor)
    served = SimpleNamespace(runtime=SimpleNamespace(things=[0]))

    def make(followed, min_score=None, **_):
        return followed, min_score

    assert source.tracker_maker(make, served, 0.7)() == (predictor.model, 0.7)
    assert source.tracker_maker(make, served)() == ("backbone", None)
    served.runtime.things = []
    assert source.tracker_maker(make, served, 0.7) is None
