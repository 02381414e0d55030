"""Panoptic quality: equal to a plain count and to panopticapi's numbers; its files and their errors."""

import json

import numpy as np
import pytest
from command_line import call
from drawn_objects import draw_segments, place_segments, write_segments
from PIL import Image

from dinoseg.extensions.objects.scoring.coco_panoptic import CocoPanoptic
from dinoseg.extensions.protocols.folders import score_cases
from dinoseg.extensions.protocols.summary import summary
from dinoseg.utils.images import write_png

WORDS = ("mode=score", "protocol=coco_panoptic", "reference=gt.json", "prediction=results.json", "mode.workers=1")
OFFICIAL = {  # of panopticapi 7bb4655 for `place_segments`: PQ, SQ and RQ
    "": (0.49066138424997446, 0.7674588702547718, 0.6379349046015713),
    "_things": (0.47125029988294415, 0.7540756406441312, 0.6235690235690236),
    "_stuff": (0.529483552984035, 0.7942253294760526, 0.6666666666666666),
}
OFFICIAL_COUNTS = {1: (18, 9, 10), 4: (8, 4, 7), 12: (10, 3, 7), 30: (0, 0, 0)}  # hits, false positives and negatives


def score(folder, categories, images):
    write_segments(folder, categories, images)
    protocol = CocoPanoptic()
    return summary(
        protocol, score_cases(protocol, protocol.find(folder / "gt.json", folder / "results.json"), where="both")
    )


def plain_counts(images, category):
    """Return the sum of IoUs, hits, false positives and false negatives of a class, in loops over masks."""
    ious = []
    wrong = 0
    missed = 0
    for _, (reference, held), (prediction, found) in images:
        matched = set()
        own = [each for each in held if each["category_id"] == category]
        for segment in own:
            mask = reference == segment["id"]
            for other in found:
                guess = prediction == other["id"]
                union = (mask | guess) & ~(guess & (reference == 0))
                iou = (mask & guess).sum() / union.sum()
                if other["category_id"] == category and not segment["iscrowd"] and iou > 0.5:
                    ious.append(iou)
                    matched |= {("reference", segment["id"]), ("prediction", other["id"])}
            missed += not segment["iscrowd"] and ("reference", segment["id"]) not in matched
        crowd = next((each["id"] for each in own[::-1] if each["iscrowd"]), -1)
        for other in found:
            guess = prediction == other["id"]
            excused = (guess & ((reference == 0) | (reference == crowd))).sum() > guess.sum() / 2
            alone = other["category_id"] == category and ("prediction", other["id"]) not in matched
            wrong += alone and not excused
    return sum(ious), len(ious), int(wrong), int(missed)


@pytest.mark.parametrize("seed", range(20))
def test_quality_equals_a_plain_count(tmp_path, seed):
    categories, images = draw_segments(seed)
    result = score(tmp_path, categories, images)
    expected = {}
    for row, category in zip(result["per_class"], categories, strict=True):
        iou, hits, wrong, missed = plain_counts(images, category["id"])
        assert (row["hits"], row["false_positives"], row["false_negatives"]) == (hits, wrong, missed)
        if hits + wrong + missed:
            rq = hits / (hits + wrong / 2 + missed / 2)
            expected[category["id"]] = (iou / hits * rq if hits else 0, iou / hits if hits else 0, rq)
            assert [row[key] for key in ("PQ", "SQ", "RQ")] == pytest.approx(expected[category["id"]], abs=1e-12)
        else:
            assert row["PQ"] is row["SQ"] is row["RQ"] is None
    for suffix, things in {"": (0, 1), "_things": (1,), "_stuff": (0,)}.items():
        group = [expected[each["id"]] for each in categories if each["isthing"] in things and each["id"] in expected]
        means = np.mean(group, axis=0).tolist() if group else [None] * 3
        assert [result["scores"][f"{key}{suffix}"] for key in ("PQ", "SQ", "RQ")] == pytest.approx(means, abs=1e-12)


def test_quality_equals_panopticapi(tmp_path):
    result = score(tmp_path, *place_segments())
    for suffix, values in OFFICIAL.items():
        assert [result["scores"][f"{key}{suffix}"] for key in ("PQ", "SQ", "RQ")] == pytest.approx(values, abs=1e-12)
    counts = {row["id"]: tuple(row.values())[-3:] for row in result["per_class"]}
    assert counts == OFFICIAL_COUNTS and result["n"] == 10
    assert all(low < result["scores"][key] < high for key, (low, high) in result["ci95"].items())


def test_negative_ids_and_flags_as_booleans_change_nothing(tmp_path):
    categories, images = place_segments()
    categories = [{**each, "id": -each["id"], "isthing": each["isthing"] == 1} for each in categories]
    images = [
        (
            -number,
            *((ids, [{**each, "category_id": -each["category_id"]} for each in segments]) for ids, segments in sides),
        )
        for number, *sides in images
    ]
    assert score(tmp_path, categories, images)["scores"]["PQ_things"] == pytest.approx(
        OFFICIAL["_things"][0], abs=1e-12
    )


def test_scores_and_their_difference_are_written(tmp_path):
    write_segments(tmp_path, *place_segments())
    words = [word.replace("results.json", "[results.json,gt.json]") for word in WORDS]
    done = call(tmp_path, *words, "hydra.run.dir=run")
    written = json.loads((tmp_path / "run/scores.json").read_text())
    assert written["scores"]["PQ"] == pytest.approx(OFFICIAL[""][0]) and written["second"]["scores"]["PQ"] == 1
    assert written["difference"]["PQ"]["value"] == pytest.approx(1 - OFFICIAL[""][0])
    assert "PQ_things" in done.out and "second - first" in done.out and "is the reference itself" in done.err


def edit_png(name, change):
    def apply(folder, sides):
        path = folder / name / "v2.png"
        write_png(path, change(np.array(Image.open(path))))

    return apply


def edit_segment(name, **values):
    return lambda folder, sides: sides[name]["annotations"][1]["segments_info"][0].update(values)


def set_corner(pixels):
    pixels[0, 0] = (9, 1, 0)
    return pixels


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (edit_png("results", set_corner), "v2.png: image 2: the id 265 is in the PNG, but not in segments_info"),
        (edit_png("gt", set_corner), "gt/v2.png: image 2: the id 265 is in the PNG, but not in segments_info"),
        (
            edit_segment("results", category_id=5),
            "image 2: segment 70001 has the category 5, which is not in categories",
        ),
        (edit_segment("gt", category_id=5), "image 2: segment 70001 has the category 5, which is not in categories"),
        (edit_segment("gt", iscrowd="1"), "image 2, segment 70001: iscrowd is '1'; it must be 0, 1, true or false"),
        (edit_segment("gt", id=0), "image 2: the id 70001 is in the PNG, but not in"),
        (edit_segment("results", id=70002), "image 2: the id 70001 is in the PNG, but not in"),
        (edit_png("results", lambda pixels: pixels[:-1]), "image 2 is 60 x 39 (width x height), its reference 60 x 40"),
        (edit_png("results", lambda pixels: pixels[..., 0]), "v2.png: image 2 has one channel: store ids as colours"),
        (lambda folder, sides: (folder / "gt/v2.png").unlink(), "v2.png: image 2: "),
        (lambda folder, sides: sides["results"]["annotations"].pop(1), "results.json: image 2 has no prediction"),
        (lambda folder, sides: sides["gt"]["annotations"].pop(1), "results.json: image 2 is not in gt.json"),
        (
            lambda folder, sides: sides["gt"]["annotations"].append(sides["gt"]["annotations"][1]),
            "gt.json: 2 annotations of images have the id 2",
        ),
        (
            lambda folder, sides: sides["gt"]["annotations"][1]["segments_info"].append({"id": 5, "category_id": 1}),
            "image 2: the id 5 in segments_info of the JSON is not in the PNG",
        ),
        (
            lambda folder, sides: sides["gt"]["annotations"][1]["segments_info"].append({"id": 0, "category_id": 1}),
            "image 2: the id 0 in segments_info of the JSON is void",
        ),
        (
            lambda folder, sides: sides["gt"]["annotations"][1]["segments_info"].append(
                {"id": 70001, "category_id": 1}
            ),
            "image 2: an id occurs twice in segments_info of the JSON",
        ),
        (lambda folder, sides: sides["gt"].pop("categories"), "reference=gt.json is not the JSON file of COCO's"),
        (lambda folder, sides: (folder / "results").rename(folder / "moved"), "results is not a folder. Give the PNG"),
    ],
)
def test_wrong_files_are_named_in_one_sentence(tmp_path, edit, expected):
    write_segments(tmp_path, *place_segments())
    sides = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("gt", "results")}
    edit(tmp_path, sides)
    for name, content in sides.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    done = call(tmp_path, *WORDS)
    assert done.status == 1 and expected in done.err, done.err
