import json
import shutil
from functools import partial

import numpy as np
import pytest
from making import DATA, save
from mistakes import assert_refused, refusals
from official_davis import official_sequence
from PIL import Image
from score_making import assert_bad_file, video_scores, write_frames

from dinoseg.extensions.protocols.davis import KEYS, Davis2016, Davis2017, Davis2017Unsupervised
from dinoseg.extensions.protocols.folders import score_cases
from dinoseg.extensions.protocols.summary import difference, summary

TASKS = {"davis2017": Davis2017, "davis2017_unsupervised": Davis2017Unsupervised, "davis2016": Davis2016}
MASKS = {"davis2017": "Annotations", "davis2017_unsupervised": "Annotations_unsupervised", "davis2016": "Annotations"}


def write_set(root, year, names, split="val"):
    path = root / "ImageSets" / year / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


def moving_squares(seed, length, size, count, *, gone=(), jitter=3):
    """Squares of ids 1..count that walk; `gone` leave after the first frame, and the last half of the frames too."""
    rng = np.random.default_rng(seed)
    places = rng.uniform((2, 2), np.array(size) / 2, (count, 2))
    steps = rng.uniform(-2, 3, (count, 2))
    frames = []
    for time in range(length):
        ids = np.zeros(size, np.uint8)
        for label in range(1, count + 1):
            row, column = np.maximum(places[label - 1] + time * steps[label - 1] + rng.uniform(-1, 1, 2) * jitter, 0)
            if time and label in gone:
                continue
            ids[int(row) : int(row) + 9 + label, int(column) : int(column) + 14 - label] = label
        frames.append(ids)
    return frames


def sequences():
    """Name to references and predictions: different sizes and lengths, void, vanished, absent and missed objects."""
    plain = moving_squares(1, 9, (60, 80), 3), moving_squares(1, 9, (60, 80), 3, jitter=6)
    gone = moving_squares(2, 6, (45, 61), 4, gone=(2, 3)), moving_squares(2, 6, (45, 61), 4, gone=(1, 3), jitter=5)
    void = moving_squares(3, 4, (90, 124), 2), moving_squares(3, 4, (90, 124), 2, jitter=8)
    for reference, prediction in zip(*void, strict=True):
        reference[10:30, 10:60] = 255
        prediction[12:25, 20:50] = 1
    late = moving_squares(4, 5, (33, 40), 5), moving_squares(4, 5, (33, 40), 3)
    late[0][0][late[0][0] > 3] = 0  # ids 4 and 5 are not in the first frame: no objects
    # id 1 is nowhere, and still an object
    hole = [np.where(ids == 1, 0, ids) for ids in moving_squares(5, 7, (50, 70), 3)]
    return {"plain": plain, "gone": gone, "void": void, "late": late, "hole": (hole, moving_squares(5, 7, (50, 70), 3))}


def three_frames():
    """One sequence, with exactly one scored frame where the ends are skipped."""
    return {"short": (moving_squares(6, 3, (40, 50), 2), moving_squares(6, 3, (40, 50), 2))}


def write_task(folder, task, held, year=None):
    root, results = folder / "DAVIS", folder / "results"
    write_set(root, year or ("2016" if task == "davis2016" else "2017"), held)
    for name, (references, predictions) in held.items():
        write_frames(root / MASKS[task] / "480p" / name, references)
        write_frames(results / name, predictions)
    return root, results


def scored(protocol, reference, prediction):
    return score_cases(protocol, protocol.find(reference, prediction), where="W", workers=1)


def mean_scores(rows):
    means = np.mean(rows, axis=0)
    return dict(zip(KEYS, [(means[0] + means[3]) / 2, *means], strict=True))


@pytest.mark.parametrize("task", ["davis2017", "davis2017_unsupervised"])
def test_objects_of_all_sequences_score_as_by_the_official_way(tmp_path, task):
    held = sequences() | three_frames()
    if task == "davis2017_unsupervised":  # ids of their own, and more of them than objects; short ones count too
        held |= {f"{end} frames": tuple(side[:end] for side in three_frames()["short"]) for end in (1, 2)}
        rng = np.random.default_rng(0)
        for _, predictions in held.values():
            order = np.concatenate([[0], rng.permutation(20) + 1]).astype(np.uint8)
            spot = rng.integers(5, 25, 2)
            for ids in predictions:
                ids[:] = order[ids]
                ids[spot[0] : spot[0] + 6, spot[1] : spot[1] + 6] = order[9]
    scores, measured, _ = video_scores(TASKS[task](), *write_task(tmp_path, task, held))
    expected = {name: official_sequence(task, *maps) for name, maps in held.items()}
    assert scores == pytest.approx(mean_scores([row for rows in expected.values() for row in rows]), abs=1e-12)
    for name, rows in expected.items():
        details = measured[name].details["objects"]
        assert list(details) == [str(index + 1) for index in range(len(rows))]
        ours = [[details[label][key] for key in KEYS[1:]] for label in details]
        if task == "davis2017":
            assert np.allclose(ours, rows, rtol=0, atol=1e-12)
        else:  # the official rows follow the proposals
            proposals = [details[label]["proposal"] for label in details]
            assert np.allclose(np.array(ours)[np.argsort(proposals)], rows, rtol=0, atol=1e-12)
            assert len(set(proposals)) == len(proposals)


def test_davis2016_scores_one_foreground(tmp_path):
    held = sequences()
    root, results = write_task(tmp_path, "davis2016", held)
    scores, measured, _ = video_scores(Davis2016(), root, results)
    # of any id, void too: one object, of which each frame besides the ends is scored as in 2017
    masks = [[[(ids > 0).astype(np.uint8) for ids in side] for side in sides] for sides in held.values()]
    rows = [row for sides in masks for row in official_sequence("davis2017", *sides)]
    assert len(rows) == len(held) and scores == pytest.approx(mean_scores(rows), abs=1e-12)
    assert measured["plain"].details["frames"] == 7


def test_davis2016_accepts_any_foreground_value(tmp_path):
    held = {"a": (moving_squares(1, 5, (30, 40), 1),) * 2}
    root, results = write_task(tmp_path, "davis2016", held)
    for index, ids in enumerate(held["a"][0]):
        kinds = [np.dstack([ids * 0, ids * 255, ids]), ids * 255, ids > 0, ids, ids.astype(np.uint16) * 256]
        Image.fromarray(kinds[index]).save(results / "a" / f"{index:05d}.png")
    assert video_scores(Davis2016(), root, results)[0]["J&F-Mean"] == 1.0


@pytest.mark.parametrize(("task", "length"), [("davis2017", 1), ("davis2016", 2)])
def test_sequences_without_a_scored_frame_add_nothing(tmp_path, task, length):
    held = three_frames()
    held["tiny"] = tuple(frames[:length] for frames in held["short"])
    root, results = write_task(tmp_path, task, held)
    protocol = TASKS[task]()
    found = protocol.find(root, results)
    assert [case.name for case in found.cases] == ["short", "tiny"]
    assert any("tiny" in note and "adds no object" in note for note in found.notes)
    scores, measured, sums = video_scores(protocol, root, results)
    assert measured["tiny"].sums.tolist() == [0.0] * 7
    assert measured["tiny"].details == {"frames": 0, "objects": {}}
    assert np.isnan(protocol.scores(sums[1])["J-Mean"])
    assert np.isfinite(list(scores.values())).all()


@pytest.mark.parametrize("task", ["davis2017", "davis2016"])
def test_intervals_count_sequences_with_a_scored_frame(tmp_path, task):
    plain, other = sequences()["plain"], sequences()["hole"]
    held = {"plain": plain, "other": other} | {f"tiny{index}": ([side[0]] * 2 for side in plain) for index in range(3)}
    if task == "davis2017":  # objects that are given in the first frame
        held["none"] = ([np.zeros((20, 30), np.uint8)] * 4,) * 2
    root, results = write_task(tmp_path, task, held)
    protocol = TASKS[task]()
    whole = scored(protocol, root, results)
    result = summary(protocol, whole)
    gap = difference(protocol, whole, whole)
    write_set(root, "2016" if task == "davis2016" else "2017", ["plain", "other"])
    few = summary(protocol, scored(protocol, root, results))
    assert result["n"] == few["n"] == gap["J-Mean"]["n"] == 2 and len(result["per_video"]) == len(held)
    assert result["ci95"] == few["ci95"] and result["unit"] == "sequence"


@pytest.mark.parametrize("task", TASKS)
def test_sequences_without_objects_add_no_object(tmp_path, task):
    empty = [np.zeros((20, 30), np.uint8)] * 4
    proposals = moving_squares(1, 4, (20, 30), 2) if task == "davis2017_unsupervised" else empty  # which are free
    held = {"none": (empty, proposals)} | three_frames()
    protocol = TASKS[task]()
    _, measured, _ = video_scores(protocol, *write_task(tmp_path, task, held))
    expected = [0.0] * 7 if task != "davis2016" else [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert measured["none"].sums.tolist() == expected


def test_vanished_object_gets_no_credit_for_an_empty_proposal(tmp_path):
    references = moving_squares(1, 8, (30, 40), 1, gone=(1,))
    elsewhere = [np.zeros((30, 40), np.uint8) for _ in references]
    for ids in elsewhere:
        ids[25:, 30:] = 1
    held = {"wrong": (references, elsewhere)}
    root, results = write_task(tmp_path, "davis2017_unsupervised", held)
    assert video_scores(Davis2017Unsupervised(), root, results)[0]["J-Mean"] == 0.0
    for ids in elsewhere:
        ids[ids > 0] = 2  # id 1 is now an empty proposal, right in all frames but the first
    write_frames(results / "wrong", elsewhere)
    scores = video_scores(Davis2017Unsupervised(), root, results)[0]
    assert scores["J-Mean"] == 7 / 8
    rows = official_sequence("davis2017_unsupervised", references, elsewhere)
    assert scores == pytest.approx(mean_scores(rows), abs=1e-12)


def with_ids(*ids):
    """Return a frame of `three_frames` with further ids in its first row."""
    frame = np.zeros((40, 50), np.uint8)
    frame[0, : len(ids)] = ids
    return frame


@pytest.mark.parametrize(
    ("task", "spoilt", "words"),
    [
        *((task, np.zeros((40, 49)), ["is 49 x 40 (width x height), its reference 50 x 40"]) for task in TASKS),
        *((task, None, []) for task in TASKS),  # half of the file
        ("davis2017", np.zeros((40, 50, 3)), ["has 3 channels"]),
        ("davis2017_unsupervised", np.zeros((40, 50, 3)), ["has 3 channels"]),
        ("davis2017", with_ids(3), ["the ids 3 in", "1 to 2"]),
        ("davis2017", with_ids(4, 200), ["the ids 4, 200 in", "1 to 2"]),
        ("davis2017", with_ids(255), ["the ids 255 in", "1 to 2"]),
        ("davis2017_unsupervised", with_ids(20, 21), ["the ids 21 in", "1 to 20"]),
    ],
)
def test_bad_files_are_named(tmp_path, task, spoilt, words):
    root, results = write_task(tmp_path, task, three_frames())
    protocol = TASKS[task]()
    (case,) = protocol.find(root, results).cases
    sides = [results / "short/00001.png", root / MASKS[task] / "480p/short/00001.png"]
    for path in sides if spoilt is None else sides[:1]:
        whole = path.read_bytes()
        if spoilt is None:
            path.write_bytes(whole[: len(whole) // 2])
        else:
            save(path, spoilt)
        assert_bad_file(lambda: protocol.measure(case), path, *words)
        path.write_bytes(whole)


def test_more_proposals_than_allowed_may_be_set(tmp_path):
    held = three_frames()
    held["short"][1][2][0, :2] = [20, 21]
    protocol = Davis2017Unsupervised(max_proposals=21)
    (case,) = protocol.find(*write_task(tmp_path, "davis2017_unsupervised", held)).cases
    assert protocol.measure(case).sums[-1] == 2 and "not official" in protocol.rules["proposals"]


def test_the_skipped_frames_are_not_read(tmp_path):
    root, results = write_task(tmp_path, "davis2017", three_frames())
    (results / "short" / "00000.png").unlink()
    (results / "short" / "00002.png").write_bytes(b"nothing")
    assert video_scores(Davis2017(), root, results)[0]["J-Mean"] > 0


@pytest.mark.parametrize("split", ["test-dev", "test-challenge"])
def test_the_unsupervised_test_sets_are_lists_of_2019(tmp_path, split):
    held = three_frames() | {"other": three_frames()["short"]}
    root, results = write_task(tmp_path, "davis2017_unsupervised", held)
    write_frames(root / "Annotations/480p/other", held["other"][0])
    write_set(root, "2017", ["other"], split=split)
    missing = f"holds no ImageSets/2019/{split}.txt; ImageSets holds 2017"
    assert_refused(lambda: Davis2017Unsupervised(split=split).find(root, results), missing)
    write_set(root, "2019", ["short"], split=split)
    assert [case.name for case in Davis2017Unsupervised(split=split).find(root, results).cases] == ["short"]
    assert [case.name for case in Davis2017(split=split).find(root, results).cases] == ["other"]
    assert [case.name for case in Davis2017Unsupervised().find(root, results).cases] == ["short", "other"]


def test_foregrounds_and_wide_ids_are_refused_as_ids(tmp_path):
    squares = moving_squares(1, 4, (30, 40), 1)
    foreground = write_task(tmp_path / "a", "davis2017", {"a": ([ids * 255 for ids in squares], squares)})
    wide = write_task(tmp_path / "b", "davis2017", {"a": ([None] * 4, squares)})
    write_frames(wide[0] / "Annotations/480p/a", [ids.astype(np.uint16) * 300 for ids in squares])
    for folders, words in (
        (foreground, ["holds only void ", "with davis2016"]),
        (wide, ["holds the ids 300 in ", "1 to 254"]),
    ):
        (case,) = Davis2017().find(*folders).cases
        path = folders[0] / "Annotations/480p/a/00000.png"
        assert_bad_file(partial(Davis2017().measure, case), path, *words)


def test_each_missing_file_is_a_problem(tmp_path):
    root, results = write_task(tmp_path, "davis2017", sequences())
    (results / "plain" / "00003.png").unlink()
    (results / "plain" / "00004.png").unlink()
    shutil.rmtree(results / "gone")
    shutil.rmtree(root / "Annotations/480p/void")
    for name in ("late/00007.png", "other/00000.png", "late/._00001.png"):
        save(results / name, np.zeros((5, 5)))
    found = Davis2017().find(root, results)
    assert [case.name for case in found.cases] == ["late", "hole"]
    problems = {path.relative_to(tmp_path).as_posix(): reason for path, reason in found.problems}
    plain = ["results/plain/00003.png", "results/plain/00004.png"]
    assert list(problems) == [*plain, "results/gone", "DAVIS/Annotations/480p/void"]
    assert all(reason.rstrip().endswith(".") for reason in problems.values())
    assert [note for note in found.notes if "other" in note and "not in val" in note]
    assert [note for note in found.notes if "00007.png" in note]
    assert not any("._" in note for note in found.notes)


def test_the_set_decides_and_its_ways_to_be_written(tmp_path):
    held = sequences()
    root, results = write_task(tmp_path, "davis2016", held, year="480p")
    paths = [f"480p/{name}/{index:05d}" for name in ("hole", "gone") for index in range(3)]
    write_set(root, "480p", [f"/JPEGImages/{path}.jpg /Annotations/{path}.png" for path in paths])
    assert [case.name for case in Davis2016().find(root, results).cases] == ["hole", "gone"]
    write_set(root, "2016", ["\ufefflate\r", "", " plain ", "late"])
    assert [case.name for case in Davis2016().find(root, results).cases] == ["late", "plain"]
    write_set(root, "2016", ["void"], split="mine")
    assert [case.name for case in Davis2016(split="mine").find(root, results).cases] == ["void"]


def test_resolution_selects_the_annotation_folder(tmp_path):
    root, results = write_task(tmp_path, "davis2017", three_frames())
    shutil.move(root / "Annotations/480p", root / "Annotations/Full-Resolution")
    assert Davis2017(resolution="Full-Resolution").find(root, results).cases
    words = ("resolution=480p: ", "does not hold this folder; it holds Full-Resolution")
    assert_refused(lambda: Davis2017().find(root, results), *words)


def test_folders_without_davis_are_refused(tmp_path):
    root, results = write_task(tmp_path, "davis2017", three_frames())

    def refuse(words, reference=root, prediction=results, make=Davis2017):
        assert_refused(lambda: make().find(reference, prediction), words)

    refuse("holds no Annotations_unsupervised", make=Davis2017Unsupervised)
    refuse(f"reference={results} is not the root of DAVIS: it holds no ImageSets/2017/val.txt", results)
    refuse(f"Try reference={root}", root / "Annotations/480p")
    refuse("does not hold this list; it holds val", make=lambda: Davis2017(split="train"))
    refuse("holds no ImageSets/2016/val.txt; ImageSets holds 2017", make=Davis2016)
    refuse("is not a folder", prediction=tmp_path / "nowhere")
    refuse("holds no folder of a sequence in val. Give the folder that holds short/", prediction=tmp_path)
    shutil.move(root / "ImageSets/2017", root / "ImageSets/2016")
    refuse("ImageSets holds 2016. Score it with davis2016")
    write_set(root, "2017", [""])
    refuse("is empty")
    for line in ("..", ".", "../short", "/etc", "a/b", "a/../00000.jpg", "/Annotations/480p/../00000.png", "a\0b"):
        write_set(root, "2017", [line])
        refuse("names no sequence")


test_options_are_refused_with_their_rule = refusals(
    {
        "no proposals": (lambda: Davis2017Unsupervised(max_proposals=0), "max_proposals=0 is ", "from 1 to 255"),
        "256 proposals": (lambda: Davis2017Unsupervised(max_proposals=256), "max_proposals=256 is ", "from 1 to 255"),
        "no split": (lambda: Davis2017(split=""), "split=", " is not a valid name"),
        "a path as split": (lambda: Davis2016(split="a/b"), "split=a/b is not a valid name"),
        "a parent as resolution": (lambda: Davis2017Unsupervised(resolution=".."), "resolution=.. is not a valid name"),
        "a number as resolution": (lambda: Davis2017(resolution=480), "resolution=480 is not a valid name. Give"),
    }
)


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "davis2016").is_dir(), reason="no DAVIS-2016 here")
def test_real_sequences_equal_themselves():
    scores, *_ = video_scores(Davis2016(), DATA / "davis2016", DATA / "davis2016/Annotations/480p")
    assert scores == {key: 0.0 if key.endswith("Decay") else 1.0 for key in KEYS}


@pytest.mark.parametrize("task", TASKS)
def test_folders_of_masks_of_one_video_are_scored(tmp_path, task):
    held = sequences()
    root, results = write_task(tmp_path, task, held)
    protocol = TASKS[task]()
    masks = root / MASKS[task] / "480p/gone"
    expected = video_scores(protocol, root, results)[1]["gone"]
    shutil.copytree(results / "gone", tmp_path / "mine")
    _, measured, _ = video_scores(protocol, masks, tmp_path / "mine")
    assert list(measured) == ["gone"] and np.array_equal(measured["gone"].sums, expected.sums)
    assert np.array_equal(video_scores(protocol, root, results / "gone")[1]["gone"].sums, expected.sums)
    gap = difference(protocol, *(scored(protocol, masks, each) for each in (tmp_path / "mine", masks)))["J-Mean"]
    assert gap["value"] > 0 and gap["n"] == 1 and gap["ci95"] is None
    mine = "masks of one video, mine, which is not a sequence in"
    assert_refused(lambda: protocol.find(root, tmp_path / "mine"), mine)
    (tmp_path / "mine/00002.png").unlink()
    (problem,) = protocol.find(masks, tmp_path / "mine").problems
    assert problem[0] == tmp_path / "mine/00002.png"


def write_tracking_run(folder, predictions, source):
    """Write a run folder of mode=track."""
    write_frames(folder / "masks", predictions)
    (folder / "track.json").write_text(json.dumps({"input": source, "frames": len(predictions)}))
    return folder


def test_tracking_run_is_scored_as_one_sequence(tmp_path):
    held = sequences()
    root, results = write_task(tmp_path, "davis2017", held)
    run = write_tracking_run(tmp_path / "run", held["gone"][1], "DAVIS/JPEGImages/480p/gone")
    protocol = Davis2017()
    _, measured, _ = video_scores(protocol, root, results)
    found, alone, _ = video_scores(protocol, root, run / "masks")
    assert list(alone) == ["gone"] and np.array_equal(alone["gone"].sums, measured["gone"].sums)
    (note,) = protocol.find(root, run / "masks").notes
    assert note == f"{run}/masks: masks of one sequence, gone; others of val are not scored"
    masks = root / "Annotations/480p/gone"  # a video of one's own, whose masks lie in a folder
    other = write_tracking_run(tmp_path / "own", held["gone"][1], "clips/own.mp4") / "masks"
    scores, alone, _ = video_scores(protocol, masks, other)
    assert scores == found and list(alone) == ["gone"]
    assert_refused(lambda: protocol.find(root, other), "masks of one video, own, which is not a sequence in")
    assert_refused(lambda: protocol.find(tmp_path, other), "holds no masks. Give a folder of PNG masks")
    (other.parent / "track.json").write_text("{}")
    assert_refused(lambda: protocol.find(masks, other), "track.json is damaged (", "input")
