"""Cityscapes against a restatement, instance by instance and pixel by pixel, of its official evaluation."""

from functools import partial

import numpy as np
import pytest
from making import save
from mistakes import assert_refused
from score_making import assert_bad_file, maps, measure_pair, scores, tree, unit_sums

from dinoseg.data.label_tables.read import label_table
from dinoseg.extensions.protocols.cityscapes import ENDING, Cityscapes

SIZES = {24: 3462.4756337644, 25: 3930.4788056518, 26: 12794.0202738185, 27: 27855.1264367816}
SIZES |= {28: 35732.1511111111, 31: 67583.7075812274, 32: 6298.7200839748, 33: 4672.3249222261}
CATEGORIES = [range(7), range(7, 11), range(11, 17), range(17, 21), (21, 22), (23,), (24, 25), range(26, 34)]
IGNORED = {*range(7), 9, 10, 14, 15, 16, 18, 29, 30}
SCORED = [label for label in range(34) if label not in IGNORED]


def path(number):
    return f"{('ulm', 'bonn')[number % 2]}/{('ulm', 'bonn')[number % 2]}_00000{number}_000019{ENDING}"


def instances_of(rng, reference):
    """Number the things of a reference in blocks, some left as groups."""
    numbers = np.kron(rng.integers(0, 4, (4, 6)), np.ones((10, 10), int))[: reference.shape[0], : reference.shape[1]]
    things = np.isin(reference, [*SIZES, 29, 30]) & (numbers > 0)
    return np.where(things, reference * 1000 + numbers - 1, reference)


def official(triples):
    """Return the four scores of (reference, prediction, instances) in loops over everything."""
    matrix = np.zeros((34, 34), int)
    hit, miss = dict.fromkeys(SIZES, 0.0), dict.fromkeys(SIZES, 0.0)
    category_hit, category_miss = [0.0] * 8, [0.0] * 8
    for reference, prediction, instances in triples:
        for row, column in zip(reference.ravel().tolist(), prediction.ravel().tolist(), strict=True):
            matrix[row, column] += 1
        for number in set(instances[instances > 1000].tolist()):
            label = number // 1000
            if label in IGNORED:
                continue
            guesses = prediction[instances == number].tolist()
            weight = SIZES[label] / len(guesses)
            hit[label] += weight * guesses.count(label)
            miss[label] += weight * (len(guesses) - guesses.count(label))
            category = 6 if label < 26 else 7
            near = sum(guess in CATEGORIES[category] for guess in guesses)
            category_hit[category] += weight * near
            category_miss[category] += weight * (len(guesses) - near)
    ious, instance_ious, category_ious, instance_category_ious = [], [], [], []
    for label in SCORED:
        wrong = sum(matrix[row, label] for row in SCORED if row != label)
        ious.append(over(matrix[label, label], matrix[label].sum() - matrix[label, label] + wrong))
        if label in SIZES:
            instance_ious.append(over(hit[label], miss[label] + wrong))
    for index, labels in enumerate(CATEGORIES):
        own = [label for label in labels if label in SCORED]
        others = [label for label in SCORED if label not in labels]
        inside = sum(matrix[row, column] for row in own for column in own)
        wrong = sum(matrix[row, column] for row in others for column in own)
        category_ious.append(over(inside, sum(matrix[row].sum() for row in own) - inside + wrong))
        if index in (6, 7):
            wrong = sum(matrix[row, column] for row in others for column in labels)
            instance_category_ious.append(over(category_hit[index], category_miss[index] + wrong))
    means = [ious, category_ious, instance_ious, instance_category_ious]
    return dict(zip(Cityscapes.keys, map(mean, means), strict=True))


def over(hits, mistakes):
    return hits / (hits + mistakes) if hits + mistakes else np.nan


def mean(values):
    defined = [value for value in values if not np.isnan(value)]
    return sum(defined) / len(defined) if defined else np.nan


def write_triples(root, triples):
    """Write references, instances and predictions."""
    folders = tree(root, [triple[:2] for triple in triples], path)
    for number, triple in enumerate(triples):
        name = path(number).replace("labelIds", "instanceIds")
        save(root / "reference" / name, triple[2], np.uint16)
    return folders


@pytest.fixture
def triples():
    rng = np.random.default_rng(0)
    return [(reference, guess, instances_of(rng, reference)) for reference, guess in maps(rng, range(34))]


@pytest.mark.parametrize("ids", [range(34), [*range(7), 21, 23, 26], [23, 24, 25, 29, 33], [26, 29, 30, 31, 11]])
def test_equals_the_official_evaluation_on_varied_maps(tmp_path, ids):
    rng = np.random.default_rng(len(ids))
    triples = [(reference, guess, instances_of(rng, reference)) for reference, guess in maps(rng, ids)]
    expected = official(triples)
    assert scores(Cityscapes(), *write_triples(tmp_path, triples)) == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_per_class_rows_follow_the_scored_ids(tmp_path, triples):
    protocol = Cityscapes()
    total = sum(unit_sums(protocol, *write_triples(tmp_path, triples)).values())
    rows = protocol.per_class(total)
    means = protocol.scores(total)
    assert [row["id"] for row in rows] == SCORED and rows[0]["name"] == "road" and rows[-1]["name"] == "bicycle"
    assert np.nanmean([row["IoU"] for row in rows]) == pytest.approx(means["IoU_classes"])
    assert np.nanmean([row["iIoU"] for row in rows]) == pytest.approx(means["iIoU_classes"])
    assert [row["id"] for row in rows if not np.isnan(row["iIoU"])] == list(SIZES)


def test_predictions_are_found_by_the_start_of_their_names(tmp_path, triples):
    reference, prediction = write_triples(tmp_path, triples)
    expected = scores(Cityscapes(), reference, prediction)
    for number in range(len(triples)):
        old = prediction / path(number)
        save(tmp_path / f"flat/a{number % 3}/{old.name.replace(ENDING, '')}_out-{number}.png", triples[number][1])
    assert scores(Cityscapes(), reference, tmp_path / "flat") == expected


def test_unmatched_files_are_reported(tmp_path, triples):
    reference, prediction = write_triples(tmp_path, triples)
    (prediction / path(2)).unlink()
    (reference / path(3).replace("labelIds", "instanceIds")).unlink()
    twice = save(prediction / "other" / path(5).split("/")[1], triples[5][1])
    save(prediction / "koeln_000001_000019.png", [[7]])
    found = Cityscapes().find(reference, prediction)
    reasons = dict(found.problems)
    assert len(found.cases) == 7 and len(reasons) == 3
    assert "has no prediction" in reasons[prediction / path(2)]
    assert "iIoU needs it. It is in" in reasons[reference / path(3).replace("labelIds", "instanceIds")]
    doubled = ["2 predictions of its image" in reasons.get(file, "") for file in (prediction / path(5), twice)]
    assert sorted(doubled) == [False, True]
    assert found.notes == [f"1 prediction in {prediction} has no reference and is not scored: koeln_000001_000019"]
    save(tmp_path / f"gt/train/ulm/ulm_9_9{ENDING}", [[7]])
    reference.rename(tmp_path / "gt/val")
    assert_refused(lambda: Cityscapes().find(tmp_path / "gt", prediction), "Try reference=", "/gt/val.")


def test_train_ids_are_refused_with_the_remedy(tmp_path):
    rng = np.random.default_rng(4)
    reference = rng.integers(7, 34, (20, 30))
    good = [(reference, rng.integers(7, 34, (20, 30)), reference)]
    folders = write_triples(tmp_path / "good", good)
    assert len(Cityscapes().find(*folders).cases) == 1
    for name, guess in (("all", rng.integers(0, 19, (20, 30))), ("void", rng.choice([*range(19), 255], (20, 30)))):
        folders = write_triples(tmp_path / name, [(reference, guess, reference)])
        assert_refused(partial(Cityscapes().find, *folders), "holds train ids (0..18)", "takes label ids")


SINGLE = {  # the files of a case
    "labels": ("a_gtFine_labelIds.png", [[7, 23, 26, 26]]),
    "instances": ("a_gtFine_instanceIds.png", [[7, 23, 26001, 26]]),
    "prediction": ("prediction.png", [[7, 23, 26, 11]]),
}


def write_single(folder, **changes):
    """Write the files of a case, some with other ids, or without any (None); return a call that measures it."""
    for side, (name, usual) in SINGLE.items():
        ids = changes.get(side, usual)
        if ids is not None:
            save(folder / name, ids, np.uint16)
    return partial(measure_pair, Cityscapes(), folder / SINGLE["labels"][0], folder / SINGLE["prediction"][0])


@pytest.mark.parametrize(
    ("side", "ids", "words"),
    [
        ("prediction", [[26] * 6], "is 6 x 1 (width x height), its reference 4 x 1"),
        ("prediction", [[255] * 4], "holds the ids 255 in 4 pixels. Label ids are 0..33; map train ids"),
        ("labels", [[34] * 4], "holds the ids 34 in 4"),
        ("instances", [[7001] * 4], "holds the ids 7001 in 4 pixels. An instance's id is 1000"),
        ("instances", [[7, 23, 1000, 999]], "in 2 pixels. An instance's id is 1000"),
        ("instances", [[26001]], "differs in size from"),
        ("instances", None, "File not found"),
    ],
)
def test_bad_files_are_named(tmp_path, side, ids, words):
    assert_bad_file(write_single(tmp_path, **{side: ids}), tmp_path / SINGLE[side][0], words)


def test_instances_in_8_bits(tmp_path):
    groups = [[7, 23, 26, 26]]
    measure = write_single(tmp_path, instances=groups)
    expected = measure().sums
    path_ = save(tmp_path / "a_gtFine_instanceIds.png", groups)
    np.testing.assert_array_equal(measure().sums, expected)
    save(path_, [[7, 23, 26001 % 256, 255]])  # cut to a byte
    assert_bad_file(measure, path_, "in 2 pixels. An instance's id is 1000")


def test_the_label_table_is_complete():
    rows = label_table("cityscapes")
    assert [int(row["id"]) for row in rows] == [*range(34), -1] and rows[-1]["name"] == "license plate"
    assert [int(row["train_id"]) for row in rows if row["train_id"] not in ("255", "-1")] == list(range(19))
    assert {int(row["id"]) for row in rows if row["ignored"] == "1"} == IGNORED | {-1}
    assert {int(row["id"]) for row in rows if row["instances"] == "1"} == {*SIZES, 29, 30}
    for index, labels in enumerate(CATEGORIES):
        assert {int(row["category_id"]) for row in rows if int(row["id"]) in labels} == {index}
    assert len({row["name"] for row in rows}) == 35 and len({row["category"] for row in rows}) == 8
    assert all(len(row["color"].split()) == 3 for row in rows)


def test_a_data_set_of_it_can_be_scored(tmp_path):
    protocol = Cityscapes()
    assert protocol.target("ulm/ulm_0_1") == "ulm/ulm_0_1_gtFine_labelIds.png"
    reference = tmp_path / "ulm_0_1_gtFine_labelTrainIds.png"
    instances = tmp_path / "ulm_0_1_gtFine_instanceIds.png"
    make_case = partial(protocol.case, "ulm/ulm_0_1", reference, tmp_path / "p.png")
    assert_bad_file(make_case, instances, "is missing, but iIoU needs it")
    save(instances, [[0]])
    case = make_case()
    assert case.files[0][0] == tmp_path / "ulm_0_1_gtFine_labelIds.png" and case.unit == "ulm/ulm_0_1"
    labels = protocol.file_ids(np.arange(19, dtype=np.uint8).reshape(1, 19))
    assert labels.dtype == np.uint8 and labels[0].tolist() == SCORED
