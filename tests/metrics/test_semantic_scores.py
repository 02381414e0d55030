"""ADE20K and the pooled semantic scores against their definitions and scikit-learn."""

import numpy as np
import pytest
from PIL import Image
from score_making import maps, save, scores, tree, unit_sums
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, recall_score

from dinoseg.metrics.protocols.ade20k import Ade20k
from dinoseg.metrics.protocols.contract import BadFile, ScoringCase
from dinoseg.metrics.protocols.semantic import Semantic
from dinoseg.utils.errors import UserError


def path(number):
    return f"part{number % 2}/image {number}.png"


def pooled_scores(pairs, num_classes, ignore=255):
    """Return the pooled scores by sets of pixel places, class by class."""
    reference = np.concatenate([pair[0].ravel() for pair in pairs])
    guess = np.concatenate([pair[1].ravel() for pair in pairs])[reference != ignore]
    reference = reference[reference != ignore]
    rows = []
    for label in range(num_classes):
        ours, theirs = (set(np.flatnonzero(ids == label).tolist()) for ids in (reference, guess))
        both, either = len(ours & theirs), len(ours | theirs)
        rows.append(
            {
                "mIoU": both / either if either else None,
                "mean_accuracy": both / len(ours) if ours else None,
                "dice": 2 * both / (len(ours) + len(theirs)) if either else None,
            }
        )
    means = {key: [row[key] for row in rows if row[key] is not None] for key in rows[0]}
    means = {key: sum(values) / len(values) if values else np.nan for key, values in means.items()}
    return means | {"accuracy": float(np.mean(reference == guess)) if len(reference) else np.nan}


def ugly(rng):
    """Return 8 classes: 7 nowhere, 6 only predicted, an image all ignored, a row predicted as 255."""
    pairs = maps(rng, range(6))
    reference, guess = (ids.copy() for ids in pairs[2])
    guess[5, :9], guess[0] = 6, 255
    holes = np.where(rng.random(pairs[1][0].shape) < 0.2, 255, pairs[1][0])
    return [*pairs, (reference, guess), (np.full((9, 9), 255), np.full((9, 9), 3)), (holes, pairs[1][1])]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pooled_scores_equal_their_definition(tmp_path, seed):
    pairs = ugly(np.random.default_rng(seed))
    found = scores(Semantic(num_classes=8), *tree(tmp_path, pairs, path))
    assert found == pytest.approx(pooled_scores(pairs, 8), abs=1e-12)


def test_pooled_scores_equal_scikit_learn(tmp_path):
    pairs = [(r, np.where(p == 255, 5, p)) for r, p in ugly(np.random.default_rng(3))]
    found = scores(Semantic(num_classes=8), *tree(tmp_path, pairs, path))
    reference, guess = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    guess, reference = guess[reference != 255], reference[reference != 255]
    seen = {"labels": range(7), "average": "macro", "zero_division": 0}
    assert found["mIoU"] == pytest.approx(jaccard_score(reference, guess, **seen), abs=1e-12)
    assert found["dice"] == pytest.approx(f1_score(reference, guess, **seen), abs=1e-12)
    assert found["accuracy"] == pytest.approx(accuracy_score(reference, guess), abs=1e-12)
    recall = recall_score(reference, guess, labels=range(6), average="macro")  # 6 is only predicted
    assert found["mean_accuracy"] == pytest.approx(recall, abs=1e-12)


def test_the_ways_of_averaging_part_as_they_should(tmp_path):
    """A predicted-only class is 0 and counted, one that is nowhere is skipped, and a mean over images is another."""
    pairs = ugly(np.random.default_rng(4))
    folders = tree(tmp_path, pairs, path)
    protocol = Semantic(num_classes=8)
    sums = unit_sums(protocol, *folders)
    total = sum(sums.values())
    rows = protocol.per_class(total)
    assert rows[6]["IoU"] == rows[6]["dice"] == 0 and np.isnan(rows[6]["accuracy"]) and np.isnan(rows[7]["IoU"])
    value = float(protocol.scores(total)["mIoU"])
    assert value == pytest.approx(sum(row["IoU"] for row in rows[:7]) / 7)
    counted = scores(Semantic(num_classes=9), *folders)["mIoU"]
    assert counted == value  # more classes that are nowhere change nothing
    each = [float(protocol.scores(one)["mIoU"]) for one in sums.values()]
    assert np.isnan(each).sum() == 1 and abs(np.nanmean(each) - value) > 0.02


def test_reduced_zero_labels_are_the_ade20k_files(tmp_path):
    rng = np.random.default_rng(5)
    stored = maps(rng, range(11))
    reference, prediction = tree(tmp_path, [(r, np.maximum(p, 1) - 1) for r, p in stored], path)
    found = scores(Semantic(num_classes=10, reduce_zero_label=True), reference, prediction)
    shifted = [(np.where(r == 0, 255, r - 1), np.maximum(p, 1) - 1) for r, p in stored]
    assert found == pytest.approx(pooled_scores(shifted, 10), abs=1e-12)
    reference, prediction = tree(tmp_path / "files", [(r, np.maximum(p, 1)) for r, p in stored], path)
    official = scores(Ade20k(num_classes=10), reference, prediction)
    assert official == pytest.approx({"mIoU": found["mIoU"], "pixel_accuracy": found["accuracy"]}, abs=1e-12)


def bands(mask, depth):
    """Return the mask's pixels whose square of side 2 * depth + 1 leaves it."""
    padded = np.pad(mask, depth)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * depth + 1,) * 2)
    return mask & ~windows.all((-2, -1))


def edge(mask):
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inner).astype(float)


@pytest.mark.parametrize("tolerance", [0, 1.5, 2])
def test_outlines_are_compared_class_by_class(tmp_path, tolerance):
    pairs = ugly(np.random.default_rng(6))
    protocol = Semantic(num_classes=8, boundary=True, nsd=True, tolerance=tolerance)
    found = scores(protocol, *tree(tmp_path, pairs, path))
    both, either, shares = np.zeros(8), np.zeros(8), []
    for reference, guess in pairs:
        depth = max(1, round(0.02 * float(np.hypot(*reference.shape))))
        for label in range(8):
            masks = [(ids == label) & (reference != 255) for ids in (reference, guess)]
            ours, theirs = (bands(mask, depth) for mask in masks)
            both[label] += (ours & theirs).sum()
            either[label] += (ours | theirs).sum()
            if not (masks[0] | masks[1]).any():
                continue
            ours, theirs = (edge(mask) for mask in masks)
            distance = np.sqrt(((ours[:, None] - theirs[None]) ** 2).sum(-1))
            near = sum((distance.min(axis) <= tolerance).sum() for axis in (0, 1)) if distance.size else 0
            shares.append(near / (len(ours) + len(theirs)))
    expected = pooled_scores(pairs, 8) | {"boundary_IoU": np.mean(both[:7] / either[:7]), "NSD": np.mean(shares)}
    assert found == pytest.approx(expected, abs=1e-12)
    total = sum(unit_sums(protocol, tmp_path / "reference", tmp_path / "prediction").values())
    rows = protocol.per_class(total)
    assert np.isnan(rows[7]["NSD"]) and rows[6]["NSD"] == 0 and 0 < rows[0]["boundary_IoU"] < 1


def test_counts_stay_exact_where_float32_does_not():
    protocol = Semantic(num_classes=2)
    sums = np.array([2**24 + 1, 1, 2**24 + 2, 1, 2**24 + 1, 2], np.int64)
    assert float(protocol.scores(sums)["accuracy"]) == (2**24 + 2) / (2**24 + 3)


@pytest.mark.parametrize("classes", [5, 150])
def test_ade20k_equals_its_definition(tmp_path, classes):
    rng = np.random.default_rng(classes)
    pairs = maps(rng, range(min(classes, 30) + 1))
    found = scores(Ade20k(num_classes=None if classes == 150 else classes), *tree(tmp_path, pairs, path))
    both, either, right, labelled = np.zeros(classes), np.zeros(classes), 0, 0
    for reference, guess in pairs:
        guess = guess * (reference > 0)
        shared = np.where(guess == reference, guess, 0)
        areas = [
            np.array([(ids == label).sum() for label in range(1, classes + 1)]) for ids in (shared, guess, reference)
        ]
        both, either = both + areas[0], either + areas[1] + areas[2] - areas[0]
        right, labelled = right + ((guess == reference) & (reference > 0)).sum(), labelled + (reference > 0).sum()
    expected = {"mIoU": np.mean(both / (either + np.spacing(1))), "pixel_accuracy": right / labelled}
    assert found == pytest.approx(expected, abs=1e-9)
    if classes == 150:
        assert found["mIoU"] < 0.2  # 120 classes that are nowhere count as 0


def test_files_that_cannot_be_scored_are_named(tmp_path):
    good = save(tmp_path / "good.png", np.arange(12).reshape(3, 4) % 4)
    wide = save(tmp_path / "wide.png", np.zeros((4, 3)))
    high = save(tmp_path / "high.png", np.full((3, 4), 9))
    deep = save(tmp_path / "deep.png", np.full((3, 4), 300), np.uint16)
    semantic, ade20k = Semantic(num_classes=4), Ade20k(num_classes=4)
    for protocol, reference, guess, at, message in (
        (semantic, good, wide, wide, r"is 3 x 4 \(width x height\), its reference 4 x 3. Predict at"),
        (semantic, high, good, high, "holds the ids 9 in 12 pixels. Classes are 0..3 and 255 is ignored"),
        (semantic, deep, good, deep, "holds the ids 300"),
        (ade20k, good, high, high, "holds the ids 9 in 9 pixels. Classes are 1..4 and 0 is none"),
        (ade20k, deep, good, deep, "holds the ids 300"),
    ):
        with pytest.raises(BadFile, match=message) as error:
            protocol.measure(ScoringCase("a", "a", ((reference, guess),)))
        assert error.value.path == at
    assert semantic.measure(ScoringCase("a", "a", ((good, deep),))).sums.tolist() == [0] * 4 + [3] * 4 + [0] * 4


def test_invalid_options_are_refused():
    for options, message in (
        ({}, "needs the number of classes. Give num_classes=19, .* or binary=true"),
        ({"num_classes": 0}, "^num_classes=0 is out of range. Give a whole number of at least 1"),
        ({"num_classes": -1}, "^num_classes=-1 is out of range"),
        ({"num_classes": 3, "binary": True}, "^binary=true with num_classes=3 .* have 2 classes"),
        ({"binary": True, "reduce_zero_label": True}, " reduce_zero_label=true: masks of 0 and 255"),
        ({"num_classes": 3, "tolerance": -1}, "^tolerance=-1 is out of range"),
        ({"num_classes": 3, "tolerance": float("nan")}, "^tolerance=nan is out of range"),
    ):
        with pytest.raises(UserError, match=message):
            Semantic(**options)
    for number in (0, -1, 256):
        with pytest.raises(UserError, match=f"^num_classes={number} is out of range. Give .* from 1 to 255, or None"):
            Ade20k(num_classes=number)


def test_ade20k_scores_only_labelled_pixels(tmp_path):
    reference = save(tmp_path / "reference.png", [[0, 0, 1, 2]])
    prediction = save(tmp_path / "prediction.png", [[255, 9, 1, 1]])
    sums = Ade20k(num_classes=2).measure(ScoringCase("a", "a", ((reference, prediction),))).sums
    assert sums.tolist() == [1, 0, 1, 0, 0, 1]
    wrong = save(tmp_path / "wrong.png", [[255, 9, 9, 1]])
    with pytest.raises(BadFile, match="holds the ids 9 in 1 pixels"):
        Ade20k(num_classes=2).measure(ScoringCase("a", "a", ((reference, wrong),)))


@pytest.mark.parametrize("ignore_index", [255, 3])
def test_stored_zero_and_255_are_ignored_where_zero_is_reduced(tmp_path, ignore_index):
    reference = save(tmp_path / "reference.png", [[0, 255, 1, 2, 3, 3, 4]])
    prediction = save(tmp_path / "prediction.png", [[0, 1, 0, 1, 2, 0, 2]])
    protocol = Semantic(num_classes=3, reduce_zero_label=True, ignore_index=ignore_index)
    case = ScoringCase("a", "a", ((reference, prediction),))
    if ignore_index == 255:
        with pytest.raises(BadFile, match="holds the ids 4 in 1 pixels"):
            protocol.measure(case)
        return
    assert protocol.measure(case).sums.tolist() == [1, 1, 1, 1, 1, 2, 2, 1, 1]  # correct, reference, predicted
    assert protocol.scores(protocol.measure(case).sums)["mIoU"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    high = Semantic(num_classes=255, reduce_zero_label=True).measure(ScoringCase("a", "a", ((reference, prediction),)))
    correct, held, _ = high.sums.reshape(3, 255)
    assert held.sum() - correct.sum() == 2 and held[254] == 0  # 255 is not class 254


def test_one_bit_masks_hold_0_and_1(tmp_path):
    truth, guess = np.array([[0, 1, 1, 0]], bool), np.array([[0, 1, 0, 0]], bool)
    for side, ids in (("reference", truth), ("prediction", guess)):
        (tmp_path / side).mkdir()
        Image.fromarray(ids).save(tmp_path / side / "a.png")
    found = scores(Semantic(num_classes=2), tmp_path / "reference", tmp_path / "prediction")
    assert found["accuracy"] == 0.75 and found["mIoU"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_links_in_circles_are_left(tmp_path):
    reference, prediction = tree(tmp_path, maps(np.random.default_rng(9), range(3)), path)
    for folder in (reference, prediction):
        (folder / "part0/up").symlink_to(folder)
        (folder / "above").symlink_to(tmp_path)
    found = Semantic(num_classes=3).find(reference, prediction)
    assert len(found.cases) == 10 and not found.problems and not found.notes


def test_predictions_inside_the_references_are_refused(tmp_path):
    reference, prediction = tree(tmp_path, maps(np.random.default_rng(9), range(3)), path)
    prediction.rename(reference / "mine")
    (tmp_path / "link").symlink_to(reference / "mine")
    for protocol in (Semantic(num_classes=3), Ade20k()):
        for folder in (reference / "mine", tmp_path / "link"):
            with pytest.raises(UserError, match=f"prediction={folder} lies inside reference={reference}"):
                protocol.find(reference, folder)


def test_missing_and_extra_files_and_links_to_data_sets(tmp_path):
    reference, prediction = tree(tmp_path, maps(np.random.default_rng(8), range(3)), path)
    (tmp_path / "link").symlink_to(prediction)
    (prediction / path(1)).unlink()
    for index in range(7):
        save(prediction / f"more/{index}.png", [[0]])
    for protocol in (Semantic(num_classes=3), Ade20k()):
        found = protocol.find(reference, tmp_path / "link")
        assert [(str(file), "has no prediction" in reason) for file, reason in found.problems] == [
            (str(tmp_path / "link" / path(1)), True)
        ]
        more = tmp_path / "link/more"
        assert found.notes == [
            f"7 predictions in {more} have no reference and are not scored: 0, 1, 2, 3, 4 and 2 more"
        ]
        assert len(found.cases) == 9 and found.cases[0].name == found.cases[0].unit == "part0/image 0"


def test_a_data_set_can_be_scored(tmp_path):
    ids = np.array([[0, 149]], np.uint8)
    assert Ade20k().file_ids(ids).tolist() == [[1, 150]] and Ade20k().file_ids(ids).dtype == np.uint8
    assert Semantic(num_classes=150).file_ids(ids).tolist() == ids.tolist()
    for protocol in (Ade20k(), Semantic(num_classes=2)):
        assert protocol.target("a/b") == "a/b.png"
        case = protocol.case("a/b", tmp_path / "r.png", tmp_path / "p.png")
        assert case.unit == "a/b" and case.files == ((tmp_path / "r.png", tmp_path / "p.png"),)


def test_predicted_ignored_class_counts_as_in_mmseg(tmp_path):
    pairs = ugly(np.random.default_rng(0))
    pairs = [(np.where(r == 255, 3, r), p) for r, p in pairs]
    protocol = Semantic(num_classes=8, ignore_index=3)
    assert scores(protocol, *tree(tmp_path, pairs, path)) == pytest.approx(pooled_scores(pairs, 8, ignore=3), abs=1e-12)
    assert "class 3 counts as 0" in protocol.rules["ignored_class"]
    assert "ignored_class" not in Semantic(num_classes=8).rules
