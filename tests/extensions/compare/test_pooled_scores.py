"""Further metrics over the images of all folds: equal to pycocotools on pooled files, and to plain counts."""

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
from drawn_objects import draw_instances, encode, write_instances
from omegaconf import OmegaConf
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dinoseg.core.metric import RowMetric
from dinoseg.evaluation.image_record import ImageRecord, read_record, write_record
from dinoseg.evaluation.scoring.intervals import UnitScore
from dinoseg.evaluation.unit_scores import further_scores, leave_units_out
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.compare.folds import pool_folds
from dinoseg.extensions.compare.pooled_scores import average_scores, build_metrics
from dinoseg.extensions.objects.scoring.average_precision import InstanceAveragePrecision
from dinoseg.extensions.objects.scoring.coco_instances import CocoInstances
from dinoseg.extensions.objects.scoring.panoptic_quality import PanopticQuality
from dinoseg.extensions.protocols.folders import score_cases
from dinoseg.metrics.wrapped import WrappedMetric
from dinoseg.utils.errors import UserError

CASES = 25


class Median(RowMetric):
    scores = {"median": "min"}

    def __init__(self, shift=0):
        self.shift = shift

    def count(self, prediction, sample):
        raise NotImplementedError

    def score_rows(self, rows):
        return {"median": np.median(np.concatenate([row["values"] for row in rows])) + self.shift}


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


def test_seeds_of_further_metrics_are_averaged(tmp_path):
    rng, metric = np.random.default_rng(0), Median()
    names = [["a", "b", "c", "d"], ["e", "f", "g", "h", "i", "j"]]
    rows = [[[{"values": rng.random(rng.integers(1, 4))} for _ in fold] for fold in names] for _ in range(2)]
    folds = []
    for fold, images in enumerate(names):
        first = write_fold(tmp_path / f"{fold}", metric, rows[0][fold], images)
        # the second seed in another order
        folds.append([first, write_fold(tmp_path / f"{fold}_1", metric, rows[1][fold][::-1], images[::-1])])
    pooled = pool(*folds, metric=metric)
    score = pooled.record.scores["median"]
    by_seed = [first + second for first, second in rows]
    assert score.value == np.mean([metric.score(each)["median"] for each in by_seed]) and score.better == "min"
    left = [[metric.score(each[:image] + each[image + 1 :])["median"] for image in range(10)] for each in by_seed]
    assert np.allclose(score.left_out, np.mean(left, axis=0), rtol=0, atol=1e-15)
    images = [np.mean([np.median(each[image]["values"]) for each in by_seed]) for image in range(10)]
    assert pooled.record.image_scores["median"] == pytest.approx(images)
    for estimates, varied in zip(pooled.seeds_of_further, ((1, 0), (0, 1)), strict=True):
        gap = metric.score(rows[varied[0]][0] + rows[varied[1]][1])["median"] - metric.score(by_seed[0])["median"]
        assert estimates["median"].error == pytest.approx(abs(gap) / 2) and estimates["median"].freedom == 1


def test_unit_that_one_seed_scores_is_scored():
    seeds = [UnitScore(value, [value, None], [value == 1, value == 3], "max", {}) for value in (1.0, 3.0)]
    mean = average_scores(seeds)
    assert mean.value == mean.left_out[0] == 2 and [*mean.scored] == [True, True]


@pytest.mark.parametrize("name", ["PQ", "wrapped"])
def test_summed_counts_of_folds_are_those_of_all_images(tmp_path, name):
    metric, rows = {
        "PQ": (PanopticQuality(["a", "b"], ["a"]), [{"segments": np.full((4, 2), each / 2)} for each in (1, 3, 2)]),
        "wrapped": (
            WrappedMetric("own", SimpleNamespace(reset=list), ignored="match"),
            [{"value": 0.5, "images": 1, "infinite": 0}] * 3,
        ),
    }[name]
    folds = [write_fold(tmp_path / "0", metric, rows[:1], ["a"])], [write_fold(tmp_path / "1", metric, rows[1:], "bc")]
    found = pool(*folds, metric=metric)
    assert {name: score.value for name, score in found.record.scores.items()} == metric.score(rows)
    assert found.left_out == found.seeds_of_further == []


@pytest.mark.parametrize("reason", ["settings", "counts", "no metric"])
def test_scores_of_other_settings_or_without_counts_are_left_out(tmp_path, reason):
    metric, rows = Median(), [{"values": np.array([1.0])}] * 2
    first = write_fold(tmp_path / "0", metric, rows, ["a", "b"])
    other = Median(1) if reason == "settings" else metric
    second = write_fold(tmp_path / "1", other, rows, ["c", "d"], stored=reason != "counts")
    found = pool_folds([dict([first]), dict([second])], 1, lambda *_: [metric] * (reason != "no metric"))
    assert not found.record.scores and not found.record.image_scores and found.left_out == ["median"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[1.0], [2]], object), "Object arrays"),
        (np.array([[1.0]]), "its counts are of 1 image, and its record of 2"),
        (np.array([["x"], ["y"]]), ""),
        (np.array([[1.0], [9]]), "its counts give a median of 5.0, and its record has 1.5"),
        (b"", "No data left"),
        (b"PK\3\4", "not a zip file"),
    ],
)
def test_damaged_counts_are_refused_with_their_folder(tmp_path, values, reason):
    rows = [{"values": np.array([each])} for each in (1.0, 2.0)]
    first, second = (write_fold(tmp_path / names, Median(), rows, [*names]) for names in ("ab", "cd"))
    path = tmp_path / "cd/counts.npz"
    if isinstance(values, bytes):
        path.write_bytes(values)
    else:
        np.savez(path, classes=second[1].counts, **{"median/values": values})
    with pytest.raises(UserError, match=f"cd holds a damaged evaluation.json or counts.npz .*{reason}"):
        pool([first], [second], metric=Median())


def test_metrics_of_a_task_are_built_without_a_key(compose, tmp_path):
    cfg = compose("mode=train", "hparam=instance", "data=folder_instances", "data.root=DATA", "data.classes=[a,b]")
    (tmp_path / "config").mkdir()
    OmegaConf.save(cfg, tmp_path / "config/config.yaml")
    (metric,) = build_metrics(Builder(cfg), tmp_path, "DATA")
    assert metric.scores == InstanceAveragePrecision.scores
