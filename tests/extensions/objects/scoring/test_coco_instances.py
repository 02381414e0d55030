"""AP of instance masks: equal to a plain count and to pycocotools' numbers; its files and their errors."""

import json
import subprocess
import sys

import numpy as np
import pytest
from command_line import call
from drawn_objects import draw_instances, encode, place_instances, write_instances
from plain_precision import plain_ap

from dinoseg.core.metric import RowMetric
from dinoseg.core.objects import RunLengths
from dinoseg.extensions.annotations.entry import polygons
from dinoseg.extensions.objects.overlaps import overlaps
from dinoseg.extensions.objects.scoring.average_precision import InstanceAveragePrecision
from dinoseg.extensions.objects.scoring.coco_instances import CocoInstances
from dinoseg.extensions.protocols.folders import score_cases
from dinoseg.extensions.protocols.summary import difference, summary

SIZES = {"": (0, 1e10), "s": (0, 1024), "m": (1024, 9216), "l": (9216, 1e10)}
WORDS = ("mode=score", "protocol=coco_instances", "reference=gt.json")
# of pycocotools 2.0.11 for `place_instances`: AP, AP50, AP75, APs, APm and APl, of all classes and of each
OFFICIAL = [0.39062525902677026, 0.5975480211410383, 0.4242337328970992]
OFFICIAL += [0.34086262930322336, 0.4756658774128811, 0.9272277227722773]
OFFICIAL_CLASSES = {
    2: (0.40877585234963465, 0.6184032876971908, 0.4147627262726272, 0.2998816172826074, 0.5409608087760771),
    5: (0.4643445794159248, 0.6654879773691655, 0.5064179632248939, 0.472949080622348, 0.5131363411066381),
    8: (0.29875534531475123, 0.5087527983567588, 0.3515205091937765, 0.2497571900047148, 0.37290048235592793),
    9: (None,) * 5,
}


def score(folder, reference, results):
    write_instances(folder, reference, results)
    protocol = CocoInstances()
    return protocol, score_cases(protocol, protocol.find(folder / "gt.json", folder / "results.json"), where="both")


def mean(values):
    defined = [each for each in values if each is not None]
    return float(np.mean(defined)) if defined else None


@pytest.mark.parametrize("seed", range(16))
def test_ap_equals_a_plain_count(tmp_path, seed):
    reference, results = draw_instances(seed)
    result = summary(*score(tmp_path, reference, results))
    expected = {key: [] for key in result["scores"]}
    for category in (each["id"] for each in reference["categories"]):
        curves = {
            key: [plain_ap(reference, results, category, sizes, each) for each in np.linspace(0.5, 0.95, 10)]
            for key, sizes in SIZES.items()
        }
        for size, values in curves.items():
            expected[f"AP{size}"].append(mean(values))
        expected["AP50"].append(curves[""][0])
        expected["AP75"].append(curves[""][5])
    for key, values in expected.items():
        assert result["scores"][key] == pytest.approx(mean(values), abs=1e-12)
        assert [row[key] for row in result["per_class"]] == pytest.approx(values, abs=1e-12)


def test_ap_equals_pycocotools(tmp_path):
    result = summary(*score(tmp_path, *place_instances()))
    assert [*result["scores"].values()] == pytest.approx(OFFICIAL, abs=1e-12)
    for row in result["per_class"]:
        assert list(row.values())[2:7] == pytest.approx(OFFICIAL_CLASSES[row["id"]], abs=1e-12)
    assert [row["objects"] for row in result["per_class"]] == [23, 17, 15, 0]
    assert result["n"] == 12 and len(result["per_image"]) == 12
    assert all(low <= OFFICIAL[place] <= high for place, (low, high) in enumerate(result["ci95"].values()))


def test_negative_ids_change_no_score(tmp_path):
    reference, results = place_instances()
    for entry in (*reference["images"], *reference["categories"], *reference["annotations"], *results):
        entry.update({key: entry[key] - 100 for key in ("id", "image_id", "category_id") if key in entry})
    scores = summary(*score(tmp_path, reference, results))["scores"]
    assert [*scores.values()] == pytest.approx(OFFICIAL, abs=1e-12)


@pytest.mark.parametrize("value", [1, "some"])
def test_results_are_never_crowds(tmp_path, value):
    reference, results = place_instances()
    scores = summary(*score(tmp_path, reference, [each | {"iscrowd": value} for each in results]))["scores"]
    assert [*scores.values()] == pytest.approx(OFFICIAL, abs=1e-12)


@pytest.mark.parametrize("value", [1.0, None, "high"])
def test_reference_with_scores_is_sized_by_its_areas(tmp_path, value):
    reference, results = place_instances()
    for entry in reference["annotations"]:
        entry.update(score=value, area=96**2)
    scores = summary(*score(tmp_path, reference, results))["scores"]
    assert scores["APs"] is None and scores["APl"] > 0


@pytest.mark.parametrize("seed", range(6))
def test_leaving_out_images_equals_a_new_computation(tmp_path, seed):
    drawn = place_instances() if seed == 0 else draw_instances(seed)
    protocol, scored = score(tmp_path, *drawn)
    rows = [measured.rows for _, measured in scored.cases]
    for units in (range(len(rows)), [place // 2 for place in range(len(rows))]):
        found, expected = (
            protocol.metric.leave_one_out(rows, units),
            RowMetric.leave_one_out(protocol.metric, rows, units),
        )
        for key in InstanceAveragePrecision.scores:
            np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-12)


def test_difference_of_two_results_leaves_out_the_same_images(tmp_path):
    reference, results = place_instances()
    protocol, first = score(tmp_path, reference, results)
    _, second = score(tmp_path, reference, [{**each, "score": each["score"] ** 2} for each in results])
    assert {(row["value"], *row["ci95"]) for row in difference(protocol, first, second).values()} == {(0, 0, 0)}
    _, second = score(tmp_path, reference, results[::2])
    gap = difference(protocol, first, second)["AP50"]
    ap = [protocol.metric.score_rows([held.rows for _, held in side.cases])["AP50"] for side in (first, second)]
    assert gap["value"] == pytest.approx(ap[1] - ap[0]) and gap["n"] == 12
    assert gap["ci95"][0] < gap["value"] < gap["ci95"][1]


def test_overlaps_of_runs_are_those_of_masks():
    rng = np.random.default_rng(0)
    masks = [rng.random((9, 7)) < share for share in (0, 0.1, 0.5, 0.5, 0.9, 1)]
    runs = [RunLengths.of_counts(RunLengths.of_mask(mask).to_counts(mask.size)) for mask in masks]
    expected = [[(first & second).sum() for second in masks] for first in masks]
    np.testing.assert_array_equal(overlaps(runs, runs), expected)
    assert [each.area for each in runs] == [mask.sum() for mask in masks]
    split = RunLengths.of_counts(np.array([0, 2, 0, 3, 1, 0, 1, 4]))  # runs of no pixels are allowed
    assert overlaps([split], [split]).tolist() == [[split.area]] == [[9]]


def test_images_without_objects_do_not_narrow_intervals(tmp_path):
    reference, results = place_instances()
    empty = [{**reference["images"][0], "id": number, "file_name": f"{number}.jpg"} for number in range(50, 80)]
    result = summary(*score(tmp_path, reference, results))
    more = summary(*score(tmp_path, {**reference, "images": reference["images"] + empty}, results))
    assert (more["n"], more["ci95"], len(more["per_image"])) == (12, result["ci95"], 42)


def test_polygons_are_rasterised_as_by_pycocotools(tmp_path):
    rings = [[10, 10, 40.5, 12, 30, 60.25], [100, 100, 120, 100, 120, 120, 100, 120]]
    mask = np.zeros((150, 200), bool)
    polygons(rings).paint(mask, True)
    assert mask.sum() == 1145  # as of pycocotools
    reference, _ = place_instances()
    annotation = {"id": 1, "image_id": 3, "category_id": 2, "area": 1145, "segmentation": rings}
    result = {"image_id": 3, "category_id": 2, "score": 0.5, "segmentation": encode(mask)}
    scores = summary(*score(tmp_path, {**reference, "annotations": [annotation]}, [result]))["scores"]
    assert scores["AP"] == scores["APm"] == pytest.approx(1) and scores["APs"] is None


@pytest.mark.parametrize(("wrong", "expected"), [(99, 0.01), (100, 0)])
def test_only_the_first_100_results_of_an_image_and_class_count(tmp_path, wrong, expected):
    reference, results = place_instances()
    annotation = {**reference["annotations"][0], "iscrowd": 0}
    right = {
        **results[0],
        **{key: annotation[key] for key in ("image_id", "category_id", "segmentation")},
        "score": 0.1,
    }
    others = [{**right, "segmentation": encode(np.zeros((150, 200))), "score": 0.5}] * wrong
    scores = summary(*score(tmp_path, {**reference, "annotations": [annotation]}, [right, *others]))["scores"]
    assert scores["AP"] == pytest.approx(expected)


@pytest.mark.parametrize(("scores", "is_named"), [((1.0, 1.0), True), ((1.0, 0.5), False), ((1.0,), False)])
def test_results_that_share_one_score_are_named(tmp_path, scores, is_named):
    reference, results = place_instances()
    results = [{**result, "score": value} for result, value in zip(results, scores, strict=False)]
    notes = score(tmp_path, reference, results)[1].notes
    assert any("have the score 1.0" in note for note in notes) == is_named


def test_scores_are_printed_and_written_without_torch(tmp_path):
    write_instances(tmp_path, *place_instances())
    code = "import sys; sys.modules['torch'] = None; from dinoseg.__main__ import main; main()"
    words = (*WORDS, "prediction=results.json", "mode.workers=1", "hydra.run.dir=run", "data.group='v(..?)'")
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "run/scores.json").read_text())
    assert [*written["scores"].values()] == pytest.approx(OFFICIAL, abs=1e-12)
    assert "39.06" in done.stdout and "95 % interval" in done.stdout


def change(side, place, **values):
    def apply(reference, results):
        entries = results if side == "results" else reference[side]
        entries[place] = {**entries[place], **values}

    return apply


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            change("results", 4, category_id=77),
            "results.json: image 6, result 4: its category_id is 77, which is not in",
        ),
        (change("results", 4, score=float("nan")), "image 6, result 4: its score is nan: give a finite number"),
        (change("results", 4, score=10**400), "image 6, result 4: its score is 1000"),
        (change("results", 4, score="high"), "image 6, result 4: its score is 'high': give a finite number"),
        (change("results", 4, image_id=99), "image 99, result 4: the image is not in gt.json"),
        (change("results", 4, segmentation=encode(np.ones((9, 9)))), "image 6, result 4: its mask has the size [9, 9]"),
        (change("results", 4, segmentation=[]), "image 6, result 4: it has no segmentation"),
        (change("annotations", 7, category_id=6), "gt.json: image 8, annotation 8: its category_id is 6, which is not"),
        (change("annotations", 7, image_id=99), "gt.json: image 99, annotation 8: the image is not in gt.json"),
        (
            change("annotations", 7, iscrowd="1"),
            "image 8, annotation 8: its iscrowd is '1'; it must be 0, 1, true or f",
        ),
        (change("annotations", 7, area=None), "image 8, annotation 8: its area is None"),
        (change("annotations", 7, area=-(10**400)), "image 8, annotation 8: its area is -1000"),
        (change("annotations", 7, id=8 + 4), "gt.json: 2 annotations have the id 12"),
        (change("images", 1, id=1), "gt.json: 2 images have the id 1"),
        (change("images", 1, width=-3), "gt.json: image 2: height 150 and width -3 are not an image size"),
        (change("categories", 1, id=2), "gt.json: 2 categories have the id 2"),
        (lambda reference, results: results[3].pop("score"), "prediction=results.json is not the JSON file of COCO's"),
        (lambda reference, results: reference.pop("categories"), "reference=gt.json is not the JSON file of COCO's"),
    ],
)
def test_wrong_files_are_named_in_one_sentence(tmp_path, edit, expected):
    reference, results = place_instances()
    edit(reference, results)
    write_instances(tmp_path, reference, results)
    done = call(tmp_path, *WORDS, "prediction=results.json", "mode.workers=1")
    assert done.status == 1 and expected in done.err, done.err


def test_folders_and_missing_files_are_refused(tmp_path):
    write_instances(tmp_path, *place_instances())
    done = call(tmp_path, *WORDS, "prediction=.")
    assert done.status == 1 and "prediction=. is not a file. Give the JSON file of COCO's results" in done.err
    done = call(tmp_path, *WORDS, "prediction=other.json")
    assert done.status == 1 and "prediction=other.json is not a file" in done.err


def test_invalid_images_can_be_skipped(tmp_path):
    reference, results = place_instances()
    change("results", 4, score=float("inf"))(reference, results)
    write_instances(tmp_path, reference, results)
    done = call(
        tmp_path, *WORDS, "prediction=results.json", "mode.workers=1", "data.on_error=skip", "hydra.run.dir=run"
    )
    written = json.loads((tmp_path / "run/scores.json").read_text())
    assert done.status == 0 and written["n"] == 11 and "result 4" in written["problems"][0]["reason"]
