import pickle
import shutil
from collections import Counter
from fractions import Fraction
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

import dinoseg
from dinoseg.evaluation.scoring.folders import score_cases
from dinoseg.metrics.clustering import adjusted_rand_index, best_overlaps, contingency
from dinoseg.metrics.protocols.contract import BadFile
from dinoseg.metrics.protocols.video_clustering import VideoClustering
from dinoseg.utils.errors import UserError

KEYS = ("ARI", "FG-ARI", "mBO", "ARI_per_frame", "FG-ARI_per_frame", "mBO_per_frame")


def loop_ari(true, predicted):
    """Pair counting in fractions: agreement of every pair of pixels, corrected for chance."""
    true, predicted = np.ravel(true).tolist(), np.ravel(predicted).tolist()
    pairs = list(combinations(range(len(true)), 2))
    in_true = sum(true[i] == true[j] for i, j in pairs)
    in_predicted = sum(predicted[i] == predicted[j] for i, j in pairs)
    in_both = sum(true[i] == true[j] and predicted[i] == predicted[j] for i, j in pairs)
    expected = Fraction(in_true * in_predicted, max(len(pairs), 1))
    divisor = Fraction(in_true + in_predicted, 2) - expected
    return float((in_both - expected) / divisor) if divisor else 1.0


def loop_overlaps(true, predicted):
    """IoU of each object with each segment, from sets of pixel positions."""
    ours, theirs = (
        {int(one): set(np.flatnonzero(np.ravel(ids) == one).tolist()) for one in np.unique(ids)}
        for ids in (true, predicted)
    )
    return [[len(a & b) / len(a | b) for b in theirs.values()] for one, a in ours.items() if one != 0]


def loop_mbo(true, predicted, matching="overlap"):
    ious = loop_overlaps(true, predicted)
    if not ious:
        return None
    if matching == "overlap":
        return sum(max(row) for row in ious) / len(ious)
    if len(ious) > len(ious[0]):
        orders = permutations(range(len(ious)), len(ious[0]))
        total = max(sum(ious[i][j] for j, i in enumerate(order)) for order in orders)
    else:
        orders = permutations(range(len(ious[0])), len(ious))
        total = max(sum(ious[i][j] for i, j in enumerate(order)) for order in orders)
    return total / len(ious)


def ari(true, predicted):
    return adjusted_rand_index(contingency(np.asarray(true), np.asarray(predicted)).counts)


CASES = {
    "random": ((3, 5, 4), 4, 3),
    "many segments": ((40,), 30, 25),
    "one true segment": ((4, 6), 1, 3),
    "one predicted segment": ((4, 6), 3, 1),
    "one each": ((4, 6), 1, 1),
    "one pixel": ((1, 1), 5, 5),
    "two pixels": ((2,), 2, 2),
    "nothing": ((0, 3), 3, 3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_ari_counts_pairs_of_pixels(case, dtype):
    shape, true_ids, predicted_ids = CASES[case]
    rng = np.random.default_rng(5)
    true, predicted = (
        rng.integers(0, true_ids, shape).astype(dtype),
        rng.integers(0, predicted_ids, shape).astype(dtype),
    )
    assert ari(true, predicted) == pytest.approx(loop_ari(true, predicted), abs=1e-15)
    assert ari(true, true) == 1.0
    assert ari(true, predicted.max(initial=0) - predicted) == ari(true, predicted)  # ids mean nothing


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_ari_equals_scikit_learn(case):
    metrics = pytest.importorskip("sklearn.metrics")
    shape, true_ids, predicted_ids = CASES[case]
    rng = np.random.default_rng(8)
    true, predicted = rng.integers(0, true_ids, shape).ravel(), rng.integers(0, predicted_ids, shape).ravel()
    predicted = np.where(rng.random(true.shape) < 0.6, true, predicted)
    assert ari(true, predicted) == pytest.approx(metrics.adjusted_rand_score(true, predicted), abs=1e-12)


def test_ari_of_single_segments_and_of_random_ids():
    assert ari(np.arange(9), np.arange(9)[::-1]) == 1.0  # 0 / 0
    assert ari(np.zeros(9, int), np.arange(9)) == 0.0
    rng = np.random.default_rng(0)
    assert abs(ari(*rng.integers(0, 7, (2, 100_000)))) < 1e-3
    assert ari([0, 0, 1, 1], [0, 1, 0, 1]) == -0.5


@pytest.mark.parametrize("scale", [10**6, 10**7, 3 * 10**7, 2**33, 10**12, 10**15])
def test_ari_is_exact_for_pixel_counts_of_long_videos(scale):
    counts = np.random.default_rng(1).integers(0, scale, (6, 5))

    def pairs(numbers):
        return sum(int(number) * (int(number) - 1) for number in np.ravel(numbers))

    total = int(counts.sum())
    cells, rows, columns = pairs(counts), pairs(counts.sum(axis=1)), pairs(counts.sum(axis=0))
    expected = Fraction(rows * columns, total * (total - 1))
    exact = (cells - expected) / (Fraction(rows + columns, 2) - expected)
    assert adjusted_rand_index(counts) == float(exact)
    assert adjusted_rand_index(np.array([[10 * scale]])) == 1.0


@pytest.mark.parametrize(
    ("dtype", "spread"),
    [
        *((np.uint8, 1), (np.uint8, 20), (np.uint16, 20), (np.uint16, 9000), (np.int32, 10**8), (np.uint64, 20)),
        *((np.int64, 10**15), (np.uint64, 10**18)),  # pairs of such ids exceed int64
    ],
)
def test_tables_hold_every_pair_and_add_up(dtype, spread):
    rng = np.random.default_rng(spread)
    frames = (rng.integers(0, 6, (2, 3, 7, 5)) * spread).astype(dtype)
    frames[0, 1] = 5 * spread
    tables = [contingency(*frames[:, time]) for time in range(3)]
    total = tables[0] + tables[1] + tables[2]
    at_once = contingency(*frames)
    pairs = Counter(zip(*frames.reshape(2, -1).tolist(), strict=True))
    for table in (total, at_once):
        assert table.counts.dtype == np.int64
        held = {
            (true, predicted): table.counts[row, column]
            for row, true in enumerate(table.true_ids.tolist())
            for column, predicted in enumerate(table.predicted_ids.tolist())
            if table.counts[row, column]
        }
        assert held == pairs
        assert table.counts.any(axis=0).all() and table.counts.any(axis=1).all()
    rest = total.without(5 * spread)
    assert 5 * spread not in rest.true_ids
    kept = frames[0] != 5 * spread
    assert np.array_equal(rest.counts, contingency(frames[0][kept], frames[1][kept]).counts)


def test_ids_that_cannot_be_counted():
    with pytest.raises(ValueError, match="must be equal"):
        contingency(np.zeros((2, 3), int), np.zeros((3, 2), int))
    with pytest.raises(ValueError, match="negative"):
        contingency(np.zeros(3, int), np.array([0, -1, 2]))


@pytest.mark.parametrize("matching", ["overlap", "hungarian"])
@pytest.mark.parametrize("case", CASES)
def test_best_overlaps_equal_sets_of_pixels(case, matching):
    if case == "many segments" and matching == "hungarian":
        shape, true_ids, predicted_ids = (20,), 6, 4
    else:
        shape, true_ids, predicted_ids = CASES[case]
    rng = np.random.default_rng(2)
    true, predicted = rng.integers(0, true_ids, shape), rng.integers(0, predicted_ids, shape)
    table = contingency(true, predicted)
    found = best_overlaps(table.counts, table.true_ids != 0, matching)
    expected = loop_mbo(true, predicted, matching)
    assert len(found) == len(set(np.ravel(true).tolist()) - {0})
    assert (found.mean() if len(found) else None) == pytest.approx(expected, abs=1e-15)


def test_a_segment_may_serve_several_objects_unless_matched():
    counts = np.array([[4, 0], [8, 0], [4, 4]])  # background, two objects
    objects = np.array([False, True, True])
    assert best_overlaps(counts, objects).tolist() == [0.5, 0.5]
    counts = np.array([[5], [3]])
    assert best_overlaps(counts, np.array([True, True])).tolist() == [5 / 8, 3 / 8]
    assert best_overlaps(counts, np.array([True, True]), "hungarian").tolist() == [5 / 8, 0.0]


def write(folder, maps, palette=False):
    for index, ids in enumerate(maps):
        path = folder / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.asarray(ids))
        if palette:
            image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
        image.save(path)


def videos():
    """Video to true and predicted ids (T, H, W); "empty" has no foreground, "partly" in one frame only."""
    rng = np.random.default_rng(4)
    held = {}
    for name, shape, count in (
        ("a", (3, 5, 6), 3),
        ("b", (2, 4, 4), 4),
        ("one", (1, 1, 1), 2),
        ("still", (1, 7, 3), 5),
    ):
        true, noise = rng.integers(0, count + 1, (2, *shape), dtype=np.uint8)
        held[name] = true, np.where(rng.random(shape) < 0.5, true * 10, noise).astype(np.uint8)
    held["one"][0][:] = 1
    held["empty"] = np.zeros((2, 3, 5), np.uint8), rng.integers(0, 4, (2, 3, 5), dtype=np.uint8)
    partly = np.zeros((3, 4, 6), np.uint8)
    partly[1, 1:3, 2:5] = 7
    held["partly"] = partly, rng.integers(0, 2, partly.shape, dtype=np.uint8)
    padded = np.where(rng.random((2, 6, 5)) < 0.3, 255, rng.integers(0, 3, (2, 6, 5))).astype(np.uint8)
    held["padded"] = padded, rng.integers(0, 3, padded.shape, dtype=np.uint8)
    return held


def write_videos(folder, held):
    for index, (name, (true, predicted)) in enumerate(held.items()):
        write(folder / "true" / name, true, palette=index % 2 == 0)
        write(folder / "predicted" / name, predicted, palette=index % 3 == 0)
    return folder / "true", folder / "predicted"


def score(protocol, folders):
    found = protocol.find(*folders)
    assert not found.problems
    measured = {case.name: pickle.loads(pickle.dumps(protocol)).measure(case) for case in found.cases}
    sums = np.stack([protocol.join([one]) for one in measured.values()])
    return {key: float(value) for key, value in protocol.scores(sums.sum(axis=0)).items()}, measured, sums


def expected_scores(held, ignore, matching):
    rows, frame_rows = [], []
    for true, predicted in held.values():
        for into, stacks in ((rows, [(true, predicted)]), (frame_rows, zip(true, predicted, strict=True))):
            for ours, theirs in stacks:
                counted = ours != ignore
                ours, theirs = ours[counted], theirs[counted]
                front = ours != 0
                into.append(
                    (loop_ari(ours, theirs), loop_ari(ours[front], theirs[front]), loop_mbo(ours, theirs, matching))
                )
    return dict(
        zip(
            KEYS,
            [
                np.mean([row[column] for row in part if row[column] is not None])
                for part in (rows, frame_rows)
                for column in range(3)
            ],
            strict=True,
        )
    )


@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize("matching", ["overlap", "hungarian"])
def test_videos_score_as_defined(tmp_path, ignore, matching):
    held = videos()
    scores, measured, _ = score(VideoClustering(ignore=ignore, matching=matching), write_videos(tmp_path, held))
    assert tuple(scores) == KEYS
    assert scores == pytest.approx(expected_scores(held, ignore, matching), abs=1e-12)
    assert measured["partly"].details == {"frames": 3, "objects": 1, "segments": 2}


def test_video_without_foreground_counts_for_fg_ari_only(tmp_path):
    protocol = VideoClustering()
    held = videos()
    only = {"empty": held["empty"]}
    scores, measured, sums = score(protocol, write_videos(tmp_path / "one", only))
    assert scores["FG-ARI"] == scores["FG-ARI_per_frame"] == 1.0
    assert np.isnan(scores["mBO"]) and np.isnan(scores["mBO_per_frame"])
    assert measured["empty"].details["objects"] == 0
    both = {"empty": held["empty"], "a": held["a"]}
    folders = write_videos(tmp_path / "two", both)
    scores, _, _ = score(protocol, folders)
    alone, _, _ = score(protocol, write_videos(tmp_path / "three", {"a": held["a"]}))
    assert scores["mBO"] == alone["mBO"]
    assert scores["FG-ARI"] == pytest.approx((1 + alone["FG-ARI"]) / 2, abs=1e-15)
    (note,) = score_cases(protocol, protocol.find(*folders), where="W", workers=1).notes
    assert note.startswith("1 of 2 references without any object: empty. The rule: a video (or frame) without fore")


def test_without_background_labels_fg_ari_skips_empty_videos(tmp_path):
    """As in SlotContrast and VideoSAUR on YouTube-VIS, per video and per frame."""
    protocol = VideoClustering(labelled_background=False)
    held = videos()
    scores, _, _ = score(protocol, write_videos(tmp_path / "one", {"empty": held["empty"]}))
    assert np.isnan(scores["FG-ARI"]) and np.isnan(scores["FG-ARI_per_frame"]) and scores["ARI"] <= 1
    true, predicted = held["a"]
    partly = (np.where(np.arange(len(true))[:, None, None] == 0, 0, true), predicted)  # no object in frame 0
    folders = write_videos(tmp_path / "two", {"empty": held["empty"], "partly": partly})
    scores, _, _ = score(protocol, folders)
    alone, _, _ = score(VideoClustering(), write_videos(tmp_path / "three", {"partly": partly}))
    assert scores["FG-ARI"] == alone["FG-ARI"]
    frames = len(true)
    assert scores["FG-ARI_per_frame"] == pytest.approx((frames * alone["FG-ARI_per_frame"] - 1) / (frames - 1))
    (note,) = score_cases(protocol, protocol.find(*folders), where="W", workers=1).notes
    assert note.startswith("1 of 2 references without any object: empty. The rule: FG-ARI and mBO leave out a video")


def test_an_all_ignored_video_and_a_perfect_one(tmp_path):
    held = {"void": (np.full((2, 3, 3), 255, np.uint8), np.zeros((2, 3, 3), np.uint8))}
    scores, measured, _ = score(VideoClustering(ignore=255), write_videos(tmp_path / "void", held))
    assert scores["ARI"] == scores["FG-ARI"] == 1.0 and np.isnan(scores["mBO"])
    assert measured["void"].details == {"frames": 2, "objects": 0, "segments": 0}
    true = videos()["a"][0]
    renamed = np.array([9, 3, 0, 200], np.uint8)[true]  # id 0 of a prediction is no background
    scores, _, _ = score(VideoClustering(matching="hungarian"), write_videos(tmp_path / "same", {"a": (true, renamed)}))
    assert scores == dict.fromkeys(KEYS, 1.0)


def test_resampled_videos_weigh_their_frames(tmp_path):
    protocol = VideoClustering()
    _, _, sums = score(protocol, write_videos(tmp_path, videos()))
    weights = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), 5)
    scores = protocol.scores(weights @ sums)
    for index, row in enumerate(weights):
        one = protocol.scores(np.repeat(sums, row, axis=0).sum(axis=0))
        for key in KEYS:
            assert scores[key][index] == pytest.approx(one[key], abs=1e-14)
    assert np.isnan(protocol.scores(np.zeros(10))["ARI"])
    assert protocol.per_class(sums[0]) == []


def test_ids_of_16_bits(tmp_path):
    true, predicted = videos()["a"]
    wide = {"a": (true.astype(np.uint16) * 300, predicted.astype(np.uint16) * 1000)}
    for name, (ours, theirs) in wide.items():
        write(tmp_path / "true" / name, ours)
        write(tmp_path / "predicted" / name, theirs)
    scores, _, _ = score(VideoClustering(), (tmp_path / "true", tmp_path / "predicted"))
    assert scores == pytest.approx(expected_scores({"a": (true, predicted)}, None, "overlap"), abs=1e-12)


def test_maps_of_something_else_are_refused(tmp_path):
    depth = np.arange(3600, dtype=np.uint16).reshape(1, 60, 60)
    for name, maps in (("flat", depth * 0), ("depth", depth)):
        write(tmp_path / name / "a", maps)
    protocol = VideoClustering()
    with pytest.raises(BadFile, match="a/00000.png: .* to 3600, above 2048") as error:
        protocol.measure(protocol.find(tmp_path / "flat", tmp_path / "depth").cases[0])
    assert error.value.path.is_relative_to(tmp_path / "depth")
    write(tmp_path / "slow" / "a", depth[:, :30])
    write(tmp_path / "slow" / "a", [depth[0, :30], depth[0, 30:]])
    write(tmp_path / "flat" / "a", np.zeros((2, 30, 60), np.uint8))
    with pytest.raises(BadFile, match="00001.png: raises the ids of its video to 3600"):
        protocol.measure(protocol.find(tmp_path / "slow", tmp_path / "flat").cases[0])


def test_files_that_cannot_be_scored_are_named(tmp_path):
    held = videos()
    folders = write_videos(tmp_path, {"a": held["a"]})
    protocol = VideoClustering()
    path = folders[1] / "a" / "00001.png"
    for spoilt, reason in (
        (np.zeros((5, 7), np.uint8), r"is 7 x 5 .* its reference 6 x 5"),
        (np.zeros((5, 6, 3), np.uint8), "3 channels"),
    ):
        Image.fromarray(spoilt).save(path)
        with pytest.raises(BadFile, match=reason) as error:
            protocol.measure(protocol.find(*folders).cases[0])
        assert error.value.path == path
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BadFile, match="00001.png"):
        protocol.measure(protocol.find(*folders).cases[0])


def test_a_video_of_too_many_segments_is_refused(tmp_path):
    true = np.zeros((2, 60, 60), np.uint16)
    predicted = true.copy()
    predicted[1] = np.arange(3600).reshape(60, 60)
    folders = tmp_path / "true", tmp_path / "predicted"
    for folder, maps in zip(folders, (true, predicted), strict=True):
        write(folder / "a", maps)
    protocol = VideoClustering()
    with pytest.raises(BadFile, match="Give segment maps, not depth maps") as error:
        protocol.measure(protocol.find(*folders).cases[0])
    assert error.value.path == folders[1] / "a" / "00001.png"


def test_each_missing_file_is_a_problem(tmp_path):
    reference, prediction = write_videos(tmp_path, videos())
    (prediction / "a" / "00001.png").unlink()
    shutil.rmtree(prediction / "b")
    write(prediction / "c", np.zeros((2, 3, 3), np.uint8))
    found = VideoClustering().find(reference, prediction)
    assert [case.name for case in found.cases] == ["empty", "one", "padded", "partly", "still"]
    assert [path.relative_to(prediction).as_posix() for path, _ in found.problems] == ["a/00001.png", "b"]
    assert any(f"in {prediction}/c have no reference" in note for note in found.notes)
    assert [len(case.files) for case in found.cases] == [2, 1, 2, 3, 1]
    for wrong, message in (
        (tmp_path / "none", "is not a folder"),
        (reference / "a", "does not hold <video>/<frame>.png"),
    ):
        with pytest.raises(UserError, match=message):
            VideoClustering().find(wrong, prediction)
        with pytest.raises(UserError, match=message):
            VideoClustering().find(reference, wrong)


@pytest.mark.parametrize(
    "options", [{"ignore": 0}, {"ignore": -1}, {"ignore": "255"}, {"ignore": True}, {"matching": "best"}]
)
def test_options_are_checked(options):
    with pytest.raises(UserError, match=f"^{next(iter(options))}="):
        VideoClustering(**options)


def test_the_config_makes_the_protocol():
    node = OmegaConf.load(Path(dinoseg.__file__).parent / "cfg" / "protocol" / "video_clustering.yaml")
    protocol = instantiate(node)
    assert (protocol.name, protocol.unit, protocol.keys) == ("video_clustering", "video", KEYS)
    assert (protocol.ignore, protocol.matching) == (None, "overlap")
    assert {"absent_class", "resolution", "ignore", "aggregation", "version", "differs"} <= protocol.rules.keys()
    assert "one to one" in VideoClustering(matching="hungarian").rules["matching"]
