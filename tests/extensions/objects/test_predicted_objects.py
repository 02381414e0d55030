"""Objects in the results of a model."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from object_models import CLASSES, COLOURS, draw_image, make_predictor

from dinoseg.report.palette import default_palette
from dinoseg.segmenter.facts import ModelFacts
from dinoseg.segmenter.model import Model
from dinoseg.segmenter.torch_runtime import TorchRuntime
from dinoseg.utils.errors import UserError


@pytest.fixture
def result():
    facts = ModelFacts(CLASSES, default_palette(3), 255, "RGB")
    image, _ = draw_image()
    return Model(TorchRuntime(make_predictor()), facts).predict(image)


def test_result_lists_objects(result):
    _, masks = draw_image()
    assert [found.class_name for found in result.objects] == ["leaf", "leaf", "stone", "ground"]
    first = result.objects[0]
    rows, columns = np.nonzero(masks[0])
    assert np.array_equal(first.mask, masks[0]) and first.area == masks[0].sum()
    assert first.class_id == 1 and first.score == pytest.approx(0.99, abs=1e-4)
    assert first.box == (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
    assert "leaf" in repr(first) and "runs" not in repr(first)


def test_distinct_objects_are_sure_and_found_once(result):
    twice = replace(result, found=result.found.select([0, 0, 1, 2, 3]))
    assert len(twice.objects) == 5
    for least in (0.5, result.objects[2].score, 1.1):
        expected = [found for found in result.objects if found.score >= least]
        assert [each.class_name for each in twice.distinct_objects(least)] == [each.class_name for each in expected]
    with pytest.raises(UserError, match="predicts classes alone"):
        replace(result, found=None).distinct_objects()


def test_overlay_outlines_and_numbers_objects(result):
    overlay = result.overlay()
    palette = default_palette(3)
    edge = tuple(overlay[np.nonzero(result.objects[2].mask)[0][0], np.nonzero(result.objects[2].mask)[1][0]])
    assert edge == palette[2]
    # the digit is white with a black border, which neither the image nor the palette has there
    inside = overlay[result.objects[2].mask]
    assert (inside == 255).all(axis=1).any() and (inside == 0).all(axis=1).any()
    assert tuple(COLOURS["blue"]) != edge
    stone = result.objects[2]
    assert stone.score < 0.92 and (result.overlay(min_score=0.92) == result.image)[stone.mask].all()


def test_objects_survive_pickling(result):
    copy = pickle.loads(pickle.dumps(result))
    assert [found.score for found in copy.objects] == [found.score for found in result.objects]
