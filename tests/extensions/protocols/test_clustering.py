import shutil
from collections import Counter
from fractions import Fraction
from functools import partial
from itertools import combinations, permutations

import numpy as np
import pytest
from making import save
from mistakes import assert_refused, refusals
from score_making import assert_bad_file, video_scores, write_frames

from dinoseg.extensions.protocols.clustering import adjusted_rand_index, best_overlaps, contingency
from dinoseg.extensions.protocols.folders import score_cases
from dinoseg.extensions.protocols.video_clustering import VideoClustering

KEYS = ("ARI", "FG-ARI", "mBO", "ARI_per_frame", "FG-ARI_per_frame", "mBO_per_frame")


def loop_ari(true, predicted):
    """Pair counting in fractions: agreement of every pair of pixels, corrected for chance."""
    true = np.ravel(true).tolist()
    predicted = np.ravel(predicted).tolist()
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
    rows = ious if len(ious) <= len(ious[0]) else list(zip(*ious, strict=True))
    orders = permutations(range(len(rows[0])), len(rows))
    return max(sum(rows[i][j] for i, j in enumerate(order)) for order in orders) / len(ious)


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


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, np.uint8) for case in CASES), ("random", np.uint16), ("many segments", np.int64)]
)
def test_ari_counts_pairs_of_pixels(case, dtype):
    shape, *numbers = CASES[case]
    rng = np.random.default_rng(5)
    true, predicted = (rng.integers(0, number, shape).astype(dtype) for number in numbers)
    assert ari(true, predicted) == pytest.approx(loop_ari(true, predicted), abs=1e-15)
    assert ari(true, true) == 1.0
    assert ari(true, predicted.max(initial=0) - predicted) == ari(true, predicted)  # ids mean nothing


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


@pytest.mark.parametrize("matching", ["overlap", "hungarian"])
@pytest.mark.parametrize("case", CASES)
def test_best_overlaps_equal_sets_of_pixels(case, matching):
    if case == "many segments" and matching == "hungarian":
        shape = (20,)
        true_ids = 6
        predicted_ids = 4
    else:
        shape, true_ids, predicted_ids = CASES[case]
    rng = np.random.default_rng(2)
    true, predicted = rng.integers(0, true_ids, shape), rng.integers(0, predicted_ids, shape)
    table = contingency(true, predicted)
    found = best_overlaps(table.counts, table.true_ids != 0, matching)
    expected = loop_mbo(true, predicted, matching)
    assert len(found) == len(set(np.ravel(true).tolist()) - {0})
    assert (found.mean() if len(found) else None) == pytest.approx(expected, abs=1e-15)


def videos():
    """Video to true and predicted ids (T, H, W); "empty" has no foreground, "partly" in one frame, "wide" 16 bits."""
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
    held["void"] = np.full((2, 3, 3), 255, np.uint8), np.zeros((2, 3, 3), np.uint8)
    held["wide"] = tuple(ids.astype(np.uint16) * 300 for ids in held["a"])
    return held


def write_videos(folder, held):
    for index, (name, (true, predicted)) in enumerate(held.items()):
        write_frames(folder / "true" / name, true, palette=index % 2 == 0)
        write_frames(folder / "predicted" / name, predicted, palette=index % 3 == 0)
    return folder / "true", folder / "predicted"


def expected_scores(held, ignore, matching):
    rows, frame_rows = [], []
    for true, predicted in held.values():
        for into, stacks in ((rows, [(true, predicted)]), (frame_rows, zip(true, predicted, strict=True))):
            for ours, theirs in stacks:
                counted = ours != ignore
                ours, theirs = ours[counted], theirs[counted]
                front = ours != 0
                front_ari = loop_ari(ours[front], theirs[front])
                into.append((loop_ari(ours, theirs), front_ari, loop_mbo(ours, theirs, matching)))
    columns = [column for part in (rows, frame_rows) for column in zip(*part, strict=True)]
    means = [np.mean([value for value in column if value is not None]) for column in columns]
    return dict(zip(KEYS, means, strict=True))


@pytest.mark.parametrize(("ignore", "matching"), [(None, "overlap"), (255, "hungarian")])
def test_videos_score_as_defined(tmp_path, ignore, matching):
    held = videos()
    protocol = VideoClustering(ignore=ignore, matching=matching)
    scores, measured, _ = video_scores(protocol, *write_videos(tmp_path, held))
    assert tuple(scores) == KEYS and ("one to one" in protocol.rules["matching"]) == (matching == "hungarian")
    assert scores == pytest.approx(expected_scores(held, ignore, matching), abs=1e-12)
    assert measured["partly"].details == {"frames": 3, "objects": 1, "segments": 2}
    void = 0 if ignore else 1
    assert measured["void"].details == {"frames": 2, "objects": void, "segments": void}


@pytest.mark.parametrize(
    ("labelled", "foreground", "rule"),
    [(True, 1.0, "a video (or frame) without fore"), (False, np.nan, "FG-ARI and mBO leave out a video")],
)
def test_videos_without_objects_follow_the_noted_rule(tmp_path, labelled, foreground, rule):
    protocol = VideoClustering(labelled_background=labelled)
    held = videos()
    scores, _, _ = video_scores(protocol, *write_videos(tmp_path / "one", {"empty": held["empty"]}))
    np.testing.assert_array_equal([scores["FG-ARI"], scores["FG-ARI_per_frame"]], foreground)
    assert np.isnan(scores["mBO"]) and np.isnan(scores["mBO_per_frame"]) and scores["ARI"] <= 1
    folders = write_videos(tmp_path / "two", {name: held[name] for name in ("a", "empty")})
    (note,) = score_cases(protocol, protocol.find(*folders), where="W", workers=1).notes
    assert note.startswith(f"1 of 2 references without any object: empty. The rule: {rule}")


def test_without_background_labels_fg_ari_skips_empty_videos(tmp_path):
    """As in SlotContrast and VideoSAUR on YouTube-VIS, per video and per frame."""
    held = videos()
    true, predicted = held["a"]
    partly = (np.where(np.arange(len(true))[:, None, None] == 0, 0, true), predicted)  # no object in frame 0
    folders = write_videos(tmp_path / "two", {"empty": held["empty"], "partly": partly})
    scores, _, _ = video_scores(VideoClustering(labelled_background=False), *folders)
    alone, _, _ = video_scores(VideoClustering(), *write_videos(tmp_path / "one", {"partly": partly}))
    assert scores["FG-ARI"] == alone["FG-ARI"]
    frames = len(true)
    assert scores["FG-ARI_per_frame"] == pytest.approx((frames * alone["FG-ARI_per_frame"] - 1) / (frames - 1))


def test_maps_of_too_many_segments_are_refused(tmp_path):
    depth = np.arange(3600, dtype=np.uint16).reshape(1, 60, 60)
    write_frames(tmp_path / "flat/a", depth * 0)
    write_frames(tmp_path / "depth/a", depth)
    write_frames(tmp_path / "halves/b", np.zeros((2, 30, 60), np.uint8))
    write_frames(tmp_path / "slow/b", [depth[0, :30], depth[0, 30:]])
    write_frames(tmp_path / "late flat/c", depth.repeat(2, 0) * 0)
    write_frames(tmp_path / "late/c", [depth[0] * 0, depth[0]])
    for reference, prediction, bad, words in (
        ("flat", "depth", "depth/a/00000.png", ["a/00000.png: ", " to 3600, above 2048"]),
        ("slow", "halves", "slow/b/00001.png", ["00001.png: raises the ids of its video to 3600"]),
        ("late flat", "late", "late/c/00001.png", ["Give segment maps, not depth maps"]),
    ):
        (case,) = VideoClustering().find(tmp_path / reference, tmp_path / prediction).cases
        assert_bad_file(partial(VideoClustering().measure, case), tmp_path / bad, *words)


def test_files_that_cannot_be_scored_are_named(tmp_path):
    folders = write_videos(tmp_path, {"a": videos()["a"]})
    (case,) = VideoClustering().find(*folders).cases
    path = folders[1] / "a/00001.png"
    save(path, np.zeros((5, 7)))
    assert_bad_file(partial(VideoClustering().measure, case), path, "is 7 x 5 ", " its reference 6 x 5")
    path.write_bytes(path.read_bytes()[:40])
    assert_bad_file(partial(VideoClustering().measure, case), path)


def test_each_missing_file_is_a_problem(tmp_path):
    reference, prediction = write_videos(tmp_path, videos())
    (prediction / "a" / "00001.png").unlink()
    shutil.rmtree(prediction / "b")
    write_frames(prediction / "c", np.zeros((2, 3, 3), np.uint8))
    found = VideoClustering().find(reference, prediction)
    assert [case.name for case in found.cases] == ["empty", "one", "padded", "partly", "still", "void", "wide"]
    assert [path.relative_to(prediction).as_posix() for path, _ in found.problems] == ["a/00001.png", "b"]
    assert any(f"in {prediction}/c have no reference" in note for note in found.notes)
    assert [len(case.files) for case in found.cases] == [2, 1, 2, 3, 1, 2, 3]
    for wrong, message in (
        (tmp_path / "none", "is not a folder"),
        (reference / "a", "does not hold <video>/<frame>.png"),
    ):
        for folders in ((wrong, prediction), (reference, wrong)):
            assert_refused(partial(VideoClustering().find, *folders), message)


test_options_are_refused = refusals(
    {
        **{f"ignore={value!r}": (partial(VideoClustering, ignore=value), "ignore=") for value in (0, -1, "255", True)},
        "unknown matching": (partial(VideoClustering, matching="best"), "matching=best"),
    }
)
