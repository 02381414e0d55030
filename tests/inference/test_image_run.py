"""Images through a model whose answer is known: how their results look."""

from types import SimpleNamespace

import numpy as np
import pytest

from dinoseg.data.classes.labels import Labels
from dinoseg.inference import image_run
from dinoseg.inference.class_record import ClassRecord, read_class_record, write_class_record
from dinoseg.inference.done import DoneInputs
from dinoseg.inference.image_run import ImageInput, ImageRun, SegmentationSettings, segment_images
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png


def test_run_renders_with_opacity_palette_and_ignore_index(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(image_run, "write_image_results", lambda *_, **named: drawn.append(named))
    write_png(tmp_path / "a.png", np.zeros((4, 6, 3), np.uint8))
    predictor = SimpleNamespace(
        ids_and_probabilities=lambda images, probabilities: [(np.zeros((4, 6), np.uint8), None) for _ in images]
    )
    labels = Labels.of(["a", "b"], [[1, 2, 3], [4, 5, 6]], 250)
    run = ImageRun(tmp_path, None, DoneInputs(tmp_path))
    segment_images(SegmentationSettings(predictor, labels, 0.25), [ImageInput(tmp_path / "a.png", "a", "a")], run)
    (named,) = drawn
    assert named["opacity"] == 0.25 and named["ignore_index"] == 250 and named["palette"] == labels.palette


def test_a_record_of_classes_comes_back(tmp_path):
    facts = (["a", "b"], [(1, 2, 3), (4, 5, 6)], 250)
    write_class_record(tmp_path, *facts, {"format": "ids"}, groups={"1": "a"})
    labels = Labels.of(["a", "b"], [[1, 2, 3], [4, 5, 6]], 250)
    assert read_class_record(tmp_path) == ClassRecord(labels, {"format": "ids"}, {"1": "a"})
    write_class_record(tmp_path, *facts, {"format": "ids"}, groups={"2": "b"})  # of more images in the same folder
    assert read_class_record(tmp_path).groups == {"1": "a", "2": "b"}
    write_class_record(tmp_path, *facts, {"format": "ids"}, groups={"2": None})  # predicted again, without groups
    assert read_class_record(tmp_path).groups == {"1": "a"}
    write_class_record(tmp_path, *facts, {}, has_layers=True)
    with pytest.raises(UserError, match="task=multilabel. Set protocol=multilabel"):
        read_class_record(tmp_path)
    assert read_class_record(tmp_path, has_layers=True) is not None
