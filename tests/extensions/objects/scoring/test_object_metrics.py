"""AP and PQ of a model's objects: equal to those of COCO's files of the same objects, on any number of ranks."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn_objects import draw_segments, write_segments
from known_objects import (
    KnownImages,
    KnownInstances,
    KnownSegments,
    draw_known_instances,
    evaluate_known,
    write_instance_files,
)
from mistakes import refusals

from dinoseg.core.metric import LabelledImage, PredictedImage, RowMetric
from dinoseg.core.objects import Objects, RunLengths
from dinoseg.core.shapes import Batch
from dinoseg.evaluation.collected import Collector, join
from dinoseg.evaluation.unit_scores import leave_units_out, metric_intervals
from dinoseg.extensions.objects.scoring.average_precision import InstanceAveragePrecision
from dinoseg.extensions.objects.scoring.coco_instances import CocoInstances
from dinoseg.extensions.objects.scoring.coco_panoptic import CocoPanoptic
from dinoseg.extensions.objects.scoring.errors import compare_objects
from dinoseg.extensions.objects.scoring.panoptic_quality import PanopticQuality
from dinoseg.extensions.protocols.folders import score_cases
from dinoseg.extensions.protocols.summary import summary
from dinoseg.metrics.rows import MetricRows
from dinoseg.report.html.pictures import OUTLINES, object_card, outline_objects
from dinoseg.report.table import class_table
from dinoseg.training.rendezvous import decode_message, encode_message


def score_files(protocol, folder):
    return summary(
        protocol, score_cases(protocol, protocol.find(folder / "gt.json", folder / "results.json"), where="both")
    )


def assert_equal_scores(result, rows, expected):
    """Compare scores, values of classes, and intervals over images with those of a protocol."""
    metric = rows.metrics[0]
    assert {name: result[name] for name in metric.scores} == pytest.approx(expected["scores"], abs=1e-12)
    for row, other in zip(result["classes"], expected["per_class"], strict=True):
        named = {key: value for key, value in other.items() if key not in ("id", "name")}
        assert {key: row[key] for key in named} == pytest.approx(named, abs=1e-12)
        assert [type(row[key]) for key in named] == [type(value) for value in named.values()]
    units = [f"{number}" for number in range(len(rows.counts[0]))]
    found = metric_intervals(metric, leave_units_out(metric, rows.counts[0], units))
    assert found.keys() == expected["ci95"].keys()
    for name, limits in expected["ci95"].items():
        assert found[name] == (limits if limits is None else pytest.approx(limits, abs=1e-9))


@pytest.mark.parametrize("seed", range(24))
def test_ap_equals_that_of_files(tmp_path, seed):
    data, predicted = draw_known_instances(seed)
    write_instance_files(tmp_path, data, predicted)
    rows = MetricRows([InstanceAveragePrecision(len(data.classes))], data)
    result = evaluate_known(data, predicted, KnownInstances, rows, batch_size=1 + seed % 3)
    assert_equal_scores(result, rows, score_files(CocoInstances(), tmp_path))


def make_panoptic(seed):
    """Return a dataset and predicted segments of `draw_segments`, and the images of its files."""
    categories, drawn = draw_segments(seed)
    places = {each["id"]: place for place, each in enumerate(categories)}
    things = [place for place, each in enumerate(categories) if each["isthing"]]
    images, predicted, files = [], [], []
    for _, (held, reference), (found, prediction) in sorted(drawn, key=lambda image: image[0]):
        mask = np.full(held.shape, 255, np.uint8)
        objects = []
        entries = []
        ids = np.zeros_like(held)
        for each in sorted(reference, key=lambda each: each["iscrowd"]):
            pixels = held == each["id"]
            label = places[each["category_id"]]
            mask[pixels] = label
            if label in things:
                objects.append((pixels, label, bool(each["iscrowd"])))
                ids[pixels] = each["id"]
                entries.append(each)
        for place, each in enumerate(categories):
            if place not in things and (mask == place).any():  # one segment of each class of stuff
                ids[mask == place] = 1000 + place
                entries.append({"id": 1000 + place, "category_id": each["id"], "iscrowd": 0})
        stacked = np.array([found == each["id"] for each in prediction], bool).reshape(-1, *held.shape)
        labels = [places[each["category_id"]] for each in prediction]
        predicted.append(Objects.of_masks(stacked, labels, np.linspace(1, 0.5, len(labels))))
        files.append((len(images), (ids, entries), (found, prediction)))
        images.append((mask, objects))
    data = KnownImages(images, len(categories), things)
    return data, predicted, categories, files


SEGMENTED = [seed for seed in range(40) if make_panoptic(seed)[0].maps["objects"].things]


@pytest.mark.parametrize("seed", SEGMENTED[:24])
def test_pq_equals_that_of_files(tmp_path, seed):
    data, predicted, categories, files = make_panoptic(seed)
    write_segments(tmp_path, categories, files)
    things = [data.classes[place] for place in data.maps["objects"].things]
    rows = MetricRows([PanopticQuality(data.classes, things)], data)
    result = evaluate_known(data, predicted, KnownSegments, rows, batch_size=1 + seed % 3)
    assert_equal_scores(result, rows, score_files(CocoPanoptic(), tmp_path))


@pytest.mark.parametrize("world_size", [2, 3])
def test_object_scores_do_not_depend_on_ranks(world_size):
    for seed in range(6):
        data, predicted = draw_known_instances(100 + seed)
        metrics = [InstanceAveragePrecision(len(data.classes)), PanopticQuality(data.classes)]
        whole = MetricRows(metrics, data)
        expected = evaluate_known(data, predicted, KnownInstances, whole)
        sent, ranks = [], []
        for rank in range(world_size):
            rows = MetricRows(metrics, data, rank, world_size)
            own = KnownImages(data.images[rank::world_size], len(data.classes), data.maps["objects"].things)
            rows.add_scores = lambda *_: None
            if len(own):
                evaluate_known(own, predicted[rank::world_size], KnownInstances, rows)
            sent += decode_message(encode_message(rows._rows))
            ranks.append(rows)
        found = {"classes": [{} for _ in data.classes]}
        MetricRows.add_scores(ranks[0], found, lambda _, sent=sent: sent)
        assert {name: found[name] for metric in metrics for name in metric.scores}.items() <= expected.items()
        assert all(
            row.items() <= other.items() for row, other in zip(found["classes"], expected["classes"], strict=True)
        )


def test_errors_are_counted_by_image_and_class():
    masks = np.zeros((6, 6, 6), bool)
    masks[0, :3, :3] = masks[1, :3, 3:] = masks[2, 3:, :3] = masks[3, 3:, 3:] = True
    masks[4, :2, :3] = masks[5, 1:3, :3] = True  # half of each lies in the other
    objects = [(masks[0], 0, False), (masks[1], 0, False), (masks[3], 1, True)]
    data = KnownImages([(np.zeros((6, 6), np.uint8), objects)] * 2, 3, (0, 1))
    # the same object twice and a duplicate, one in a crowd, one invented, one that is not sure, one of stuff
    labels, scores = [0, 0, 0, 1, 1, 1, 2], [0.9, 0.85, 0.8, 0.7, 0.6, 0.3, 0.9]
    predicted = [Objects.of_masks(masks[[4, 4, 5, 3, 2, 2, 1]], labels, scores), Objects.of_masks(masks[:0], [])]
    seen = []
    metric = PanopticQuality(data.classes, ["class 0", "class 1"])
    rows = MetricRows([metric], data, on_errors=lambda *given: seen.append(given))
    result = evaluate_known(data, predicted, KnownInstances, rows, batch_size=1)
    expected = {"found": [1, 0, 0], "missed": [1, 0, 0], "invented": [1, 1, 0]}
    expected |= {"merged": [0, 0, 0], "split": [2, 0, 0]}
    assert {name: each.tolist() for name, each in rows.errors[0].items()} == expected
    assert {name: each.tolist() for name, each in rows.errors[1].items()} == {
        "found": [0, 0, 0],
        "missed": [2, 0, 0],
        "invented": [0, 0, 0],
        "merged": [0, 0, 0],
        "split": [0, 0, 0],
    }
    assert [row["missed"] for row in result["classes"]] == [3, 0, 0]
    assert [[row[name] for row in result["classes"]] for name in ("annotated", "counted", "count_error")] == [
        [4, 0, 0],
        [2, 1, 0],
        [1, 0.5, 0],  # of the two images: 1 invented and 1 missed, 2 missed; 1 invented, none
    ]
    assert metric.advise(result).startswith("Objects are counted several times: 2 of 3 counted objects share an")
    assert metric.advise({**result, "classes": result["classes"][1:]}) == ""
    rows = class_table(result, data.classes, metrics=[metric]).splitlines()
    assert [line.split()[-7:] for line in rows if "class 1" in line][-1] == ["0", "1", "0", "0", "1", "0", "0"]
    # a share of annotated objects for merged ones, and of counted ones for split ones
    for annotated, merged, counted, split, told in (
        (20, 2, 9, 0, ""),
        (20, 3, 99, 0, "3 of 20 annotated"),
        (9, 0, 20, 2, ""),
        (99, 0, 20, 3, "3 of 20 counted"),
    ):
        row = {"annotated": annotated, "merged": merged, "counted": counted, "split": split}
        advice = metric.advise({"classes": [row], "miou": 0.5})
        assert told in advice and bool(told) == bool(advice)
    assert [index for index, *_ in seen] == [0, 1] and seen[0][2]["invented"].classes.tolist() == [0, 1]
    drawn = outline_objects(np.zeros((12, 12, 3), np.uint8), seen[1][2])
    assert (drawn[:6] == OUTLINES["missed"]).all(axis=-1).any() and not drawn[8:].any()
    assert {tuple(colour) for colour in drawn.reshape(-1, 3).tolist()} == {(0, 0, 0), OUTLINES["missed"]}


class ObjectCount(RowMetric):
    """A metric of a user: share of images with as many predicted objects as there are."""

    scores = {"object_count": "max"}
    needs_objects = True

    def count(self, prediction, sample):
        return {"equal": np.array([len(prediction.objects) == len(sample.objects)])}

    def score_rows(self, rows):
        return {"object_count": np.concatenate([row["equal"] for row in rows]).mean()}


def test_own_metrics_of_objects_need_no_errors():
    data, predicted = draw_known_instances(5)
    rows = MetricRows([ObjectCount()], data)
    result = evaluate_known(data, predicted, KnownInstances, rows)
    equal = [len(found) == len(held) for found, (_, held) in zip(predicted, data.images, strict=True)]
    assert result["object_count"] == np.mean(equal) and rows.errors == []
    assert "missed" not in class_table(result, data.classes, metrics=rows.metrics)
    both = MetricRows([ObjectCount(), InstanceAveragePrecision(len(data.classes))], data)
    evaluate_known(data, predicted, KnownInstances, both)
    assert [each.keys() for each in both.errors] == [{"found", "missed", "invented", "merged", "split"}] * len(data)


def make_objects(*entries, scores=None):
    """Return objects of the first pixels of an image (1, 40), from (start, end, class, crowd) of each."""
    masks = np.zeros((len(entries), 1, 40), bool)
    for mask, (start, end, *_) in zip(masks, entries, strict=True):
        mask[0, start:end] = True
    labels, crowds = ([entry[place] for entry in entries] for place in (2, 3))
    runs = [RunLengths.of_mask(mask) for mask in masks]
    return Objects.of_runs((1, 40), runs, labels, scores, crowds)


def test_errors_at_the_limits_of_score_and_iou():
    held = make_objects(
        (9, 23, 0, False),
        (12, 27, 0, False),
        (0, 5, 0, False),
        (0, 4, 1, False),
        (30, 34, 1, True),
        (20, 24, 1, True),
    )
    found = make_objects(
        (9, 23, 0, False),  # shares more with the first object than with the second
        (18, 28, 0, False),  # of the second object; half of it lies in the one above
        (10, 24, 0, False),  # most of it does
        (0, 3, 0, False),
        (2, 5, 0, False),  # of an object that is found before
        (0, 8, 1, False),  # an IoU of 0.5
        (22, 26, 1, False),  # half of it lies in a crowd
        (31, 36, 1, False),  # most of it lies in a crowd
        scores=[0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5, 0.5],
    )
    compared = compare_objects(held, found, {0, 1})
    areas = {name: [mask.area for mask in objects.masks] for name, objects in compared.items()}
    assert areas.pop("split") == [14, 10, 3, 3] and areas.pop("merged") == [14, 15]
    assert areas == {"found": [14, 15, 5], "missed": [4], "invented": [3, 8, 4]}
    first = compare_objects(held, found.select([0]), {0, 1})
    assert [mask.area for mask in first["found"].masks] == [14]


def leave_duplicates_out(entries):
    """Return the entries without those of which more than half lies in earlier ones of their class."""
    kept = []
    for start, end, label, crowd in entries:
        better = set().union(*(range(*each[:2]) for each in kept if each[2] == label))
        if 2 * len(better & {*range(start, end)}) <= end - start:
            kept.append((start, end, label, crowd))
    return kept


def test_merged_and_split_objects_are_those_of_a_count_by_pixels():
    rng = np.random.default_rng(0)
    for _ in range(200):
        held, found = [
            [(start, start + rng.integers(1, 12), rng.integers(2), rng.random() < crowds) for start in starts]
            for crowds in (0.3, 0)
            for starts in [rng.integers(0, 28, rng.integers(0, 12))]
        ]
        compared = compare_objects(make_objects(*held), make_objects(*found), {0, 1})
        found = leave_duplicates_out(found)
        pairs = [
            (one, other, len({*range(*one[:2])} & {*range(*other[:2])}))
            for one, other in product(held, found)
            if one[2] == other[2] and not one[3]
        ]
        covered = [(one, other) for one, other, common in pairs if common > (one[1] - one[0]) / 2]
        inside = [(one, other) for one, other, common in pairs if common > (other[1] - other[0]) / 2]
        merged = {id(one) for one, by in covered if sum(other is by for _, other in covered) > 1}
        split = {id(other) for of, other in inside if sum(one is of for one, _ in inside) > 1}
        for name, objects, expected in (("merged", held, merged), ("split", found, split)):
            spans = [(*each[:2], each[2]) for each in objects if id(each) in expected]
            masks = zip(compared[name].masks, compared[name].classes, strict=True)
            assert [(runs.starts[0], runs.ends[-1], label) for runs, label in masks] == spans


def test_pq_of_overlapping_objects_and_of_an_ignored_class():
    """The best object covers the other one, and the ignored class of stuff is void."""
    metric = PanopticQuality(["thing", "stuff", "ignored"], ["thing"])
    mask = np.repeat(np.array([0, 1, 2], np.uint8), [10, 10, 20])[None]
    found = make_objects((0, 10, 0, False), (0, 20, 1, False), scores=[0.9, 0.8])
    sample = LabelledImage(mask, 3, ignore_index=2, objects=make_objects((0, 10, 0, False)))
    counts = metric.count(PredictedImage(mask, objects=found), sample)["segments"]
    assert counts.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_images_with_most_errors_are_shown_on_any_ranks(world_size):
    numbers = [(1, 0), (0, 2), (3, 1), (0, 0), (2, 1), (1, 1), (0, 1), (5, 0), (2, 0), (0, 2)]  # missed and invented
    data = KnownImages([(np.zeros((4, 5), np.uint8), [])] * len(numbers), 2, (0, 1))
    ranks = [Collector(data, rank, world_size) for rank in range(world_size)]
    image = torch.zeros(3, 4, 5, dtype=torch.uint8)
    for index, each in enumerate(numbers):
        whole = np.ones((1, 4, 5), bool)
        found = {
            name: Objects.of_masks(np.repeat(whole, number, axis=0), [1] * number)
            for name, number in zip(OUTLINES, (1, *each), strict=True)
        }
        collector = ranks[index % world_size]
        collector.add_errors(index, image, found)
        mask = torch.zeros(1, 4, 5, dtype=torch.uint8)
        collector.add(Batch(image[None], mask, [data.names[index]]), mask, torch.zeros(1, 2, 4, 5))
    parts = [part for collector in ranks for part in decode_message(encode_message(collector.parts))]
    shown = join(parts).errors
    assert [shot.index for shot in shown] == [7, 2, 4, 1, 5, 8]
    assert shown[1].numbers == {"found": 1, "missed": 3, "invented": 1}
    assert (shown[0].outlines[0] == OUTLINES["missed"]).all() and not shown[0].frame.any()
    card = object_card(shown[1], SimpleNamespace(images=data.names))
    assert card["title"] == "p002" and card["summary"] == "3 of 4 objects missed, 1 invented"


def test_absent_classes_and_single_images_leave_scores_undefined():
    empty = KnownImages([(np.full((4, 4), 255, np.uint8), [])] * 2, 2, (0, 1))
    predicted = [Objects.of_masks(np.ones((1, 4, 4), bool), [1], [0.5])] * 2
    for metric in (InstanceAveragePrecision(2), PanopticQuality(empty.classes)):
        rows = MetricRows([metric], empty)
        result = evaluate_known(empty, predicted, KnownInstances, rows)
        assert [result[name] for name in metric.scores] == [None] * len(metric.scores)
        scores = leave_units_out(metric, rows.counts[0], ["a", "a"]).values()
        assert {score.value for score in scores} == {None} and {len(score.left_out) for score in scores} == {1}


class WithoutObjects(KnownImages):
    maps = {}

    def __init__(self):
        pass


test_metrics_of_objects_need_data_with_objects = refusals(
    {
        "data without objects": (
            lambda: MetricRows([InstanceAveragePrecision(2)], WithoutObjects()),
            "InstanceAveragePrecision compares objects, and this dataset has none",
            "data=coco_instances",
        ),
        "other things": (
            lambda: MetricRows([PanopticQuality(["class 0", "class 1"])], KnownImages([], 2, (1,))),
            "disagree on whether class 0 are things",
            "data.things=[NAME]",
        ),
    }
)
