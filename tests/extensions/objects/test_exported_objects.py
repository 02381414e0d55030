"""Objects of exported graphs, in numpy, compared with those of PyTorch."""

import re
from dataclasses import replace

import numpy as np
import pytest
from docs_pages import ROOT, blocks
from object_models import CLASSES, draw_image, make_model, make_predictor
from test_finding import draw

from dinoseg.core.objects import Objects, RunLengths
from dinoseg.extensions.export import objects as exported
from dinoseg.extensions.export import onnx_file
from dinoseg.extensions.export.graph import record_of, trace
from dinoseg.extensions.export.onnx_model import load_onnx
from dinoseg.extensions.export.onnx_pictures import GraphRuntime
from dinoseg.extensions.export.options import GraphOptions
from dinoseg.extensions.objects.finding import find_instances, find_segments
from dinoseg.extensions.objects.tasks import InstanceTask
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

ABOUT = {"classes": CLASSES, "palette": [[0, 0, 0], [34, 119, 255], [204, 255, 0]], "ignore_index": 255}


def are_equal(found, expected):
    """Return whether objects are equal up to rounding."""
    assert found.size == expected.size and found.classes.tolist() == expected.classes.tolist()
    assert found.scores == pytest.approx(expected.scores, abs=1e-5)
    return all(
        np.array_equal(own.to_mask(found.size), other.to_mask(found.size))
        for own, other in zip(found.masks, expected.masks, strict=True)
    )


@pytest.mark.parametrize("valid", [(1.0, 1.0), (0.7, 0.9)])
def test_numpy_finds_the_objects_that_torch_finds(valid):
    counts = [0, 0]
    for seed in range(80):
        classes, masks, size, num_classes, things = draw(seed)
        if seed % 5 == 0:
            classes = classes[..., :-1]
        masks = masks + 0.01 * masks.sign()  # no pixel is at the threshold up to rounding
        of_torch = (classes.float(), masks.float(), size, valid, num_classes, things)
        limit = {"max_instances": [100, 5][seed % 2]}
        instances = find_instances(*of_torch, **limit)
        segments = find_segments(*of_torch, score_threshold=0.5, overlap_threshold=0.3)
        for image in range(2):
            given = (classes[image].float().numpy(), masks[image].float().numpy(), size, valid)
            options = {"num_classes": num_classes, "things": sorted(things)}
            own = exported.find_instances(*given, **options, **limit)
            assert are_equal(own, instances[image]) and len(own) <= limit["max_instances"], seed
            counts[0] += len(own)
            own = exported.find_segments(*given, **options, score_threshold=0.5, overlap_threshold=0.3)
            assert are_equal(own, segments[image]), seed
            counts[1] += len(own)
    assert min(counts) > 100


@pytest.fixture(scope="module", params=["instance", "panoptic"])
def task(request):
    return request.param


def export(folder, task, model=None, **changes):
    model = make_model(task) if model is None else model
    record, reason = record_of(model, None, GraphOptions(), (60, 90), opset=18)
    made = onnx_file.to_onnx(trace(model, record), record)
    assert reason is None
    onnx_file.finish(made, record, {**ABOUT, **changes})
    return onnx_file.write(made, folder / "model.onnx")[-1]


def test_onnx_file_finds_the_objects_of_its_model(tmp_path, task):
    runtime = load_onnx(export(tmp_path, task), device="cpu").runtime
    assert runtime.task == task and sorted(runtime.things) == [1, 2]
    predictor = make_predictor(task)
    images = [draw_image(seed=seed)[0] for seed in range(3)] + [np.zeros((60, 90, 3), np.uint8)]
    results = runtime.predict(images)
    for (ids, found), expected in zip(results, predictor.predict(images), strict=True):
        # pairs of a query and another class have equal scores of 1e-6
        assert len(found) == len(expected.objects)
        sure, own = ([*np.flatnonzero(each.scores > 0.1)] for each in (expected.objects, found))
        assert are_equal(found.select(own), expected.objects.select(sure))
        assert np.array_equal(ids, expected.ids)
    assert np.array_equal(runtime.ids(images), [ids for ids, _ in results])
    assert runtime.probabilities(images) == pytest.approx(predictor.probabilities(images).numpy(), abs=1e-5)
    assert {0, 1, 2} == {*np.unique(results[0][0]).tolist()} and not results[3][0].any()


def test_documented_numpy_finds_the_same_objects(tmp_path, task):
    path = export(tmp_path, task)
    page = ROOT / "docs/onnx.md"
    parts = [block for _, block in blocks(page, "python|py") if re.search("import onnxruntime|class_logits", block)]
    code = "".join(parts).replace("EXPORTED_ONNX/model.onnx", str(path)).replace("IMAGE", str(tmp_path / "image.png"))
    count = 0
    for image in (draw_image(seed=0)[0][:57, :83], draw_image(seed=1)[0], np.zeros((40, 64, 3), np.uint8)):
        write_png(tmp_path / "image.png", image)
        names = {}
        exec(compile(code, page, "exec"), names)
        scores, classes, masks = zip(*names["objects"], strict=True) if names["objects"] else ((), (), ())
        found = Objects.of_runs(image.shape[:2], list(map(RunLengths.of_mask, masks)), list(classes), np.array(scores))
        ((_, expected),) = load_onnx(path, device="cpu").runtime.predict([image])
        assert are_equal(found, expected)
        count += (expected.scores > 0.5).sum()
    assert count > 2


def test_onnx_file_limits_instances_as_its_model(tmp_path):
    model = make_model("instance")
    model.task = InstanceTask(CLASSES, background="ground", max_instances=2)
    ((_, found),) = load_onnx(export(tmp_path, "instance", model), device="cpu").runtime.predict(
        [draw_image(seed=0)[0]]
    )
    assert len(found) == 2


def test_file_with_objects_of_unknown_classes_is_refused(tmp_path):
    path = export(tmp_path, "panoptic", classes=CLASSES[:2], palette=ABOUT["palette"][:2])
    with pytest.raises(UserError, match="2 classes"):
        load_onnx(path, device="cpu")


class OwnTask(InstanceTask):
    """A task that finds its objects in a way of its own."""

    def __init__(self, classes, things):
        super().__init__(classes, things)
        self.graph_options = None


def test_graphs_that_find_no_objects_are_refused():
    with pytest.raises(UserError, match="export.pixels=true"):
        record_of(make_model(), None, GraphOptions(pixels=True), (32, 32))
    model = make_model()
    model.task = OwnTask(CLASSES, ["leaf"])
    with pytest.raises(UserError, match="OwnTask"):
        record_of(model, None, GraphOptions(), (32, 32))


def test_first_of_equal_queries_wins_each_pixel():
    classes = np.log([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]], dtype=np.float32)
    masks = np.full((2, 3, 3), 2, np.float32)
    options = {"num_classes": 2, "things": [0, 1], "score_threshold": 0.8, "overlap_threshold": 0.8}
    found = exported.find_segments(classes, masks, (6, 6), (1.0, 1.0), **options)
    assert found.classes.tolist() == [0] and found.areas.tolist() == [36]


def test_queries_without_an_object_are_no_segments():
    record, _ = record_of(make_model(), None, GraphOptions(), (60, 90), opset=18)
    classes = np.array([[[0, 0, 0, 9], [0, 9, 0, 0]]], np.float32)
    masks = np.array([np.full((8, 8), 9), np.full((8, 8), 2)], np.float32)[None]
    ((_, found),) = GraphRuntime(lambda pixels: [classes, masks], record).predict([draw_image()[0]])
    assert found.classes.tolist() == [1] and found.areas.tolist() == [60 * 90]


def test_record_with_objects_of_pixels_is_refused(tmp_path):
    model = make_model()
    record, _ = record_of(model, None, GraphOptions(), (60, 90), opset=18)
    made = onnx_file.to_onnx(trace(model, record), record)
    onnx_file.finish(made, replace(record, kind="pixels"), ABOUT)
    path = onnx_file.write(made, tmp_path / "model.onnx")[-1]
    with pytest.raises(UserError, match="cannot find objects"):
        load_onnx(path, device="cpu")
