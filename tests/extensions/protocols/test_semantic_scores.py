"""ADE20K and the pooled semantic scores against their definitions, and what ids mean to them."""

from functools import partial

import numpy as np
import pytest
from making import save
from mistakes import assert_refused, refusals
from score_making import assert_bad_file, boundary_iou, maps, mean, measure_pair, scores, surface_dice, tree, unit_sums

from dinoseg.extensions.protocols.ade20k import Ade20k
from dinoseg.extensions.protocols.semantic import Semantic


def path(number):
    return f"part{number % 2}/image {number}.png"


def pooled_scores(pairs, num_classes, ignore=255):
    """Return the pooled scores by sets of pixel places, class by class."""
    reference = np.concatenate([pair[0].ravel() for pair in pairs])
    guess = np.concatenate([pair[1].ravel() for pair in pairs])[reference != ignore]
    reference = reference[reference != ignore]

    def share(part, whole):
        return part / whole if whole else None

    rows = []
    for label in range(num_classes):
        ours, theirs = (set(np.flatnonzero(ids == label).tolist()) for ids in (reference, guess))
        both = len(ours & theirs)
        areas = len(ours) + len(theirs)
        rows.append((share(both, areas - both), share(both, len(ours)), share(2 * both, areas)))
    means = map(mean, zip(*rows, strict=True))
    return dict(zip(("mIoU", "mean_accuracy", "dice"), means, strict=True)) | {"accuracy": np.mean(reference == guess)}


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


@pytest.mark.parametrize("tolerance", [0, 1.5])
def test_outlines_are_compared_class_by_class(tmp_path, tolerance):
    pairs = ugly(np.random.default_rng(6))
    protocol = Semantic(num_classes=8, boundary=True, nsd=True, tolerance=tolerance)
    found = scores(protocol, *tree(tmp_path, pairs, path))
    classes = [
        [(reference == label, (guess == label) & (reference != 255)) for reference, guess in pairs]
        for label in range(8)
    ]
    shares = [surface_dice(*pair, tolerance) for masks in classes for pair in masks]
    expected = pooled_scores(pairs, 8) | {"boundary_IoU": mean(map(boundary_iou, classes)), "NSD": mean(shares)}
    assert found == pytest.approx(expected, abs=1e-12)
    total = sum(unit_sums(protocol, tmp_path / "reference", tmp_path / "prediction").values())
    rows = protocol.per_class(total)
    assert np.isnan(rows[7]["NSD"]) and rows[6]["NSD"] == 0 and 0 < rows[0]["boundary_IoU"] < 1
    assert rows[6]["IoU"] == rows[6]["dice"] == 0 and np.isnan(rows[6]["accuracy"]) and np.isnan(rows[7]["IoU"])


@pytest.mark.parametrize("classes", [5, 150])
def test_ade20k_equals_its_definition(tmp_path, classes):
    rng = np.random.default_rng(classes)
    pairs = maps(rng, range(min(classes, 30) + 1))
    found = scores(Ade20k(num_classes=None if classes == 150 else classes), *tree(tmp_path, pairs, path))
    both = np.zeros(classes)
    either = np.zeros(classes)
    right = 0
    labelled = 0
    for reference, guess in pairs:
        guess = guess * (reference > 0)
        shared = np.where(guess == reference, guess, 0)
        areas = [
            np.array([(ids == label).sum() for label in range(1, classes + 1)]) for ids in (shared, guess, reference)
        ]
        both, either = both + areas[0], either + areas[1] + areas[2] - areas[0]
        right = right + ((guess == reference) & (reference > 0)).sum()
        labelled = labelled + (reference > 0).sum()
    expected = {"mIoU": np.mean(both / (either + np.spacing(1))), "pixel_accuracy": right / labelled}
    assert found == pytest.approx(expected, abs=1e-9)
    if classes == 150:
        assert found["mIoU"] < 0.2  # 120 classes that are nowhere count as 0


def test_files_that_cannot_be_scored_are_named(tmp_path):
    good = save(tmp_path / "good.png", np.arange(12).reshape(3, 4) % 4)
    wide = save(tmp_path / "wide.png", np.zeros((4, 3)))
    high = save(tmp_path / "high.png", np.full((3, 4), 9))
    deep = save(tmp_path / "deep.png", np.full((3, 4), 300), np.uint16)
    semantic = Semantic(num_classes=4)
    ade20k = Ade20k(num_classes=4)
    for protocol, reference, guess, bad, words in (
        (semantic, good, wide, wide, "is 3 x 4 (width x height), its reference 4 x 3. Predict at"),
        (semantic, high, good, high, "holds the ids 9 in 12 pixels. Classes are 0..3 and 255 is ignored"),
        (semantic, deep, good, deep, "holds the ids 300"),
        (ade20k, good, high, high, "holds the ids 9 in 9 pixels. Classes are 1..4 and 0 is none"),
        (ade20k, deep, good, deep, "holds the ids 300"),
    ):
        assert_bad_file(partial(measure_pair, protocol, reference, guess), bad, words)
    assert measure_pair(semantic, good, deep).sums.tolist() == [0] * 4 + [3] * 4 + [0] * 4


test_options_are_refused_with_their_rule = refusals(
    {
        "no classes": (Semantic, "needs the number of classes. Give num_classes=19, ", "or binary=true"),
        "0 classes": (partial(Semantic, 0), "num_classes=0 is out of range. Give a whole number of at least 1"),
        "3 binary classes": (partial(Semantic, 3, binary=True), "binary=true with num_classes=3", "have 2 classes"),
        "reduced binary masks": (
            partial(Semantic, binary=True, reduce_zero_label=True),
            " reduce_zero_label=true: masks of 0 and 255",
        ),
        "tolerance below 0": (partial(Semantic, 3, tolerance=-1), "tolerance=-1 is out of range"),
        "no class of ADE20K": (partial(Ade20k, num_classes=0), "num_classes=0 is out of range", "from 1 to 255"),
        "256 classes of ADE20K": (partial(Ade20k, num_classes=256), "num_classes=256 is out of range", "or None"),
    }
)


def test_ade20k_reads_no_prediction_of_unlabelled_pixels(tmp_path):
    reference = save(tmp_path / "reference.png", [[0, 0, 1, 2]])
    prediction = save(tmp_path / "prediction.png", [[255, 9, 1, 1]])
    sums = measure_pair(Ade20k(num_classes=2), reference, prediction).sums
    assert sums.tolist() == [1, 0, 1, 0, 0, 1]


def test_stored_zero_and_255_are_ignored_where_zero_is_reduced(tmp_path):
    reference = save(tmp_path / "reference.png", [[0, 255, 1, 2, 3, 3, 4]])
    prediction = save(tmp_path / "prediction.png", [[0, 1, 0, 1, 2, 0, 2]])
    usual = Semantic(num_classes=3, reduce_zero_label=True)
    assert_bad_file(partial(measure_pair, usual, reference, prediction), reference, "holds the ids 4 in 1 pixels")
    protocol = Semantic(num_classes=3, reduce_zero_label=True, ignore_index=3)
    sums = measure_pair(protocol, reference, prediction).sums
    assert sums.tolist() == [1, 1, 1, 1, 1, 2, 2, 1, 1]  # correct, reference, predicted
    assert protocol.scores(sums)["mIoU"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    high = measure_pair(Semantic(num_classes=255, reduce_zero_label=True), reference, prediction)
    correct, held, _ = high.sums.reshape(3, 255)
    assert held.sum() - correct.sum() == 2 and held[254] == 0  # 255 is not class 254


def test_predictions_inside_the_references_are_refused(tmp_path):
    reference, prediction = tree(tmp_path, maps(np.random.default_rng(9), range(3)), path)
    prediction.rename(reference / "mine")
    (tmp_path / "link").symlink_to(reference / "mine")
    for protocol in (Semantic(num_classes=3), Ade20k()):
        for folder in (reference / "mine", tmp_path / "link"):
            words = f"prediction={folder} lies inside reference={reference}"
            assert_refused(partial(protocol.find, reference, folder), words)


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
        extra = "have no reference and are not scored: 0, 1, 2, 3, 4 and 2 more"
        assert found.notes == [f"7 predictions in {tmp_path / 'link/more'} {extra}"]
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


def test_binary_masks_are_two_classes(tmp_path):
    rng = np.random.default_rng(11)
    pairs = [tuple((rng.random((9, 7)) < share).astype(int) for _ in range(2)) for share in (0.2, 0.5, 0, 1)]
    as_ids = tree(tmp_path / "as ids", pairs, path)
    for name, factors in (("both", (255, 255)), ("predicted ids", (255, 1)), ("ids", (1, 1))):
        drawn = [(reference * factors[0], guess * factors[1]) for reference, guess in pairs]
        folders = tree(tmp_path / name, drawn, path)
        protocol = Semantic(binary=True, nsd=True, tolerance=0)
        found = scores(protocol, *folders)
        expected = scores(Semantic(num_classes=2, nsd=True, tolerance=0), *as_ids)
        assert found == expected and 0 < found["NSD"] < 1
        assert protocol.rules["ignore"] == "nothing" and "binary" in protocol.rules
    good = save(tmp_path / "good.png", [[0, 255]])
    grey = save(tmp_path / "grey.png", [[255, 128]])
    mixed = save(tmp_path / "mixed.png", [[1, 255]])
    for files, bad, ids in (((good, grey), grey, 128), ((mixed, good), mixed, 1)):
        words = f"holds the ids {ids} in 1 pixels. A binary mask holds only 0 and 255"
        assert_bad_file(partial(measure_pair, protocol, *files), bad, words)


def notes_of(folder, references, **options):
    """Return the notes on references that predictions equal."""
    found = Semantic(**options).find(*tree(folder, [(mask, mask) for mask in references], path))
    assert len(found.cases) == len(references)
    return found.notes


def test_references_of_0_and_255_alone_are_warned_of(tmp_path):
    masks = [np.array([[0, 255, 0]]), np.zeros((1, 3))]
    for classes in (2, 19):
        (note,) = notes_of(tmp_path / "a", masks, num_classes=classes)
        assert "holds 0 and 255 alone" in note and "set the protocol's binary=true" in note
    two = {"num_classes": 2}
    for options in ({"binary": True}, {"num_classes": 1}, two | {"ignore_index": 9}, two | {"reduce_zero_label": True}):
        assert not notes_of(tmp_path / "a", masks, **options)
    others = ([*masks, np.array([[0, 1, 255]])], [*masks, np.array([[2, 2, 2]])], [np.zeros((2, 2))])
    for number, references in enumerate((*others, [np.full((2, 2), 255)])):
        assert not notes_of(tmp_path / f"b{number}", references, num_classes=3)


def test_one_foreign_id_is_offered_to_be_ignored(tmp_path):
    guess = save(tmp_path / "guess.png", [[0, 1, 1]])
    for stored, options, message in (
        ([[0, 1, 11]], {}, "set num_classes, ignore_index=11 to ignore these pixels, or correct it"),
        ([[1, 2, 5]], {"reduce_zero_label": True}, "set num_classes, ignore_index=4 to ignore"),
        ([[0, 11, 12]], {}, "255 is ignored: set num_classes or correct it"),
        ([[0, 11, 255]], {}, "255 is ignored: set num_classes or correct it"),
    ):
        reference = save(tmp_path / "reference.png", stored)
        protocol = Semantic(num_classes=4, **options)
        assert_bad_file(partial(measure_pair, protocol, reference, guess), reference, message)
    reference = save(tmp_path / "reference.png", [[1, 2, 5]])
    protocol = Semantic(num_classes=4, reduce_zero_label=True, ignore_index=4)
    assert measure_pair(protocol, reference, guess).sums[:4].sum() == 2
