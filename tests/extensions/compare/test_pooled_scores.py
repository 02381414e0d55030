"""Further metrics over the images of all folds: equal to pycocotools on pooled files, and to plain counts."""

import contextlib
import io

import numpy as np
import pytest
from drawn_objects import draw_instances, encode, write_instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dinoseg.core.metric import Metric, RowMetric
from dinoseg.evaluation.image_record import ImageRecord, read_record, write_record
from dinoseg.evaluation.unit_scores import further_scores, leave_units_out
from dinoseg.extensions.compare.folds import pool_folds
from dinoseg.extensions.objects.scoring.coco_instances import CocoInstances
from dinoseg.extensions.objects.scoring.panoptic_quality import PanopticQuality
from dinoseg.extensions.protocols.folders import score_cases

CASES = 25


class Median(RowMetric):
    scores = {"median": "min"}

    def __init__(self, shift=0):
        self.shift = shift

    def count(self, prediction, sample):
        raise NotImplementedError

    def score_rows(self, rows):
        return {"median": np.median(np.concatenate([row["values"] for row in rows])) + self.shift}


class Share(Metric):
    scores = {"share": "max"}
    count = Median.count

    def compute(self, sums):
        return {"share": sums["right"] / sums["all"]}


def write_fold(folder, metric, rows, names, stored=True):
    """Write the evaluation of images with these rows, and return it as read, by its folder."""
    scores = further_scores(metric, leave_units_out(metric, rows, names))
    said = {"classes": ["a"], "palette": [(0, 0, 0)], "ignore_index": 255, "background": None, "data": "x", "root": ""}
    said |= {"split": "val", "unit": "image", "source": "", "images": names, "units": names, "scores": scores}
    main = next(iter(metric.scores))
    images = {main: [metric.score([row])[main] for row in rows]}
    folder.mkdir(parents=True)
    record = ImageRecord(**said, counts=np.ones((len(rows), 3, 1), int), image_scores=images)
    write_record(record, folder, {main: rows} if stored else None)
    return folder, read_record(folder)


def pool(*folds, metric):
    """Return the result of folds, each a list of the evaluations of its seeds."""
    return pool_folds([dict(fold) for fold in folds], 1, lambda place, root: [metric])


def draw_pooled(seed):
    """Return COCO's references and results of two to four folds, the images of which follow one another."""
    reference, results, ends = {"images": [], "annotations": []}, [], []
    for fold in range(2 + seed % 3):
        held, found = draw_instances(4 * seed + fold)
        reference["categories"] = [{"id": number, "name": f"class {number}"} for number in (3, 7, 20)]
        held["images"].sort(key=lambda image: image["id"])
        for entry in (*held["annotations"], *found):
            entry.update(image_id=entry["image_id"] + 10 * fold, segmentation=encode(entry["mask"]))
        reference["images"] += [{**image, "id": image["id"] + 10 * fold} for image in held["images"]]
        reference["annotations"] += held["annotations"]
        results += found
        ends.append(len(reference["images"]))
    for number, entry in enumerate(reference["annotations"], 1):
        entry["id"] = number
    return reference, results, ends[:-1]


def official(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        held = COCO(str(folder / "gt.json"))
        evaluation = COCOeval(held, held.loadRes(str(folder / "results.json")), "segm")
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            step()
    return evaluation.stats[:6]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
def test_pooled_ap_equals_pycocotools_on_pooled_files(tmp_path):
    for seed in range(CASES):
        reference, results, ends = draw_pooled(seed)
        if not results:
            continue  # pycocotools reads no empty file
        folder = tmp_path / str(seed)
        folder.mkdir()
        write_instances(folder, reference, results)
        protocol = CocoInstances()
        scored = score_cases(protocol, protocol.find(folder / "gt.json", folder / "results.json"), where="both")
        rows = [measured.rows for _, measured in scored.cases]
        names = [str(entry["id"]) for entry in reference["images"]]
        folds = [
            [write_fold(folder / part[0], protocol.metric, [rows[names.index(name)] for name in part], [*part])]
            for part in np.split(names, ends)
        ]
        pooled = pool(*folds, metric=protocol.metric).record
        found = [pooled.scores[name].value for name in protocol.metric.scores]
        expected = official(folder)
        assert found == pytest.approx(np.where(expected < 0, np.nan, expected), abs=1e-12, nan_ok=True)
        whole = leave_units_out(protocol.metric, rows, names)
        for name, score in whole.items():
            assert np.array_equal(pooled.scores[name].left_out, np.array(score.left_out, float), equal_nan=True)


def draw_folds(tmp_path, metric, make_row, seeds):
    """Return two folds of `seeds` evaluations, those of other seeds in another order, and the rows of each by name."""
    rng = np.random.default_rng(0)
    folds, rows = [], []
    for fold, count in enumerate((4, 6)):
        names = [f"{fold}{number}" for number in range(count)]
        drawn = [{name: make_row(rng) for name in names} for _ in range(seeds)]
        orders = [names, names[::-1]]
        folds.append(
            [
                write_fold(tmp_path / f"{fold}_{seed}", metric, [of_seed[name] for name in order], order)
                for seed, (of_seed, order) in enumerate(zip(drawn, orders, strict=False))
            ]
        )
        rows.append([[*of_seed.values()] for of_seed in drawn])
    return folds, rows


def test_seeds_of_further_metrics_are_averaged(tmp_path):
    metric = Median()
    folds, rows = draw_folds(tmp_path, metric, lambda rng: {"values": rng.random(rng.integers(1, 4))}, 2)
    pooled = pool(*folds, metric=metric)
    score = pooled.record.scores["median"]
    by_seed = [rows[0][seed] + rows[1][seed] for seed in range(2)]
    assert score.value == np.mean([metric.score(each)["median"] for each in by_seed]) and score.better == "min"
    left = [[metric.score(each[:image] + each[image + 1 :])["median"] for image in range(10)] for each in by_seed]
    assert np.allclose(score.left_out, np.mean(left, axis=0), rtol=0, atol=1e-15)
    images = [np.mean([np.median(each[image]["values"]) for each in by_seed]) for image in range(10)]
    assert pooled.record.image_scores["median"] == pytest.approx(images)
    second = (rows[0][1] + rows[1][0], rows[0][0] + rows[1][1])
    for estimates, varied in zip(pooled.seeds_of_further, second, strict=True):
        gap = metric.score(varied)["median"] - metric.score(by_seed[0])["median"]
        assert estimates["median"].error == pytest.approx(abs(gap) / 2) and estimates["median"].freedom == 1


@pytest.mark.parametrize(
    ("metric", "make_row"),
    [
        (PanopticQuality(["a", "b"], ["a"]), lambda rng: {"segments": rng.integers(0, 3, (4, 2)) * 0.5}),
        (Share(), lambda rng: {"right": rng.integers(4), "all": np.uint8(4)}),
    ],
)
def test_summed_counts_of_folds_are_those_of_all_images(tmp_path, metric, make_row):
    folds, rows = draw_folds(tmp_path, metric, make_row, 1)
    found = pool(*folds, metric=metric)
    expected = metric.score(rows[0][0] + rows[1][0])
    assert {name: score.value for name, score in found.record.scores.items()} == expected
    assert found.left_out == found.seeds_of_further == []


@pytest.mark.parametrize("reason", ["settings", "counts", "no metric"])
def test_scores_of_other_settings_or_without_counts_are_left_out(tmp_path, reason):
    metric, rows = Median(), [{"values": np.array([1.0])}] * 2
    first = write_fold(tmp_path / "0", metric, rows, ["a", "b"])
    other = Median(1) if reason == "settings" else metric
    second = write_fold(tmp_path / "1", other, rows, ["c", "d"], stored=reason != "counts")
    folds = [dict([first]), dict([second])]
    found = pool_folds(folds, 1, lambda place, root: [] if reason == "no metric" else [metric])
    assert not found.record.scores and not found.record.image_scores and found.left_out == ["median"]
