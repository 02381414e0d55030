import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from official_davis import official_boundary, official_region, official_sequence, official_statistics
from omegaconf import OmegaConf
from PIL import Image

import dinoseg
from dinoseg.evaluation.scoring.folders import Unscorable
from dinoseg.evaluation.scoring.folders import score_cases as run_score
from dinoseg.evaluation.scoring.summary import difference, summary
from dinoseg.metrics.protocols.contract import BadFile
from dinoseg.metrics.protocols.davis import KEYS, Davis2016, Davis2017, Davis2017Unsupervised
from dinoseg.utils.errors import UserError

TASKS = {"davis2017": Davis2017, "davis2017_unsupervised": Davis2017Unsupervised, "davis2016": Davis2016}
MASKS = {"davis2017": "Annotations", "davis2017_unsupervised": "Annotations_unsupervised", "davis2016": "Annotations"}
PALETTE = [value for index in range(256) for value in ((index * 37) % 256, (index * 91) % 256, index)]
DATA = Path(os.environ.get("DINOSEG_DATA", Path(__file__).parents[3] / "shared" / "data")) / "davis2016"


def write(path, ids, palette=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(ids))
    if palette:
        image.putpalette(PALETTE)
    image.save(path)


def write_set(root, year, names, split="val"):
    path = root / "ImageSets" / year / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


def write_frames(folder, maps, palette=True):
    for index, ids in enumerate(maps):
        if ids is not None:
            write(folder / f"{index:05d}.png", ids, palette)


def moving_squares(seed, length, size, count, *, gone=(), jitter=3):
    """Squares of ids 1..count that walk; `gone` leave after the first frame, and the last half of the frames too."""
    rng = np.random.default_rng(seed)
    places, steps = rng.uniform((2, 2), np.array(size) / 2, (count, 2)), rng.uniform(-2, 3, (count, 2))
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
    hole = [
        np.where(ids == 1, 0, ids) for ids in moving_squares(5, 7, (50, 70), 3)
    ]  # id 1 is nowhere, and still an object
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


def score(protocol, root, results):
    found = protocol.find(root, results)
    assert not found.problems
    measured = {case.name: pickle.loads(pickle.dumps(protocol)).measure(case) for case in found.cases}
    sums = np.stack([protocol.join([one]) for one in measured.values()])
    return {key: float(value) for key, value in protocol.scores(sums.sum(axis=0)).items()}, measured, sums


def mean_scores(rows):
    means = np.mean(rows, axis=0)
    return dict(zip(KEYS, [(means[0] + means[3]) / 2, *means], strict=True))


@pytest.mark.parametrize("task", ["davis2017", "davis2017_unsupervised"])
@pytest.mark.parametrize("make", [sequences, three_frames])
def test_objects_of_all_sequences_score_as_by_the_official_way(tmp_path, task, make):
    held = make()
    if task == "davis2017_unsupervised":  # ids of their own, and more of them than objects
        rng = np.random.default_rng(0)
        for _, predictions in held.values():
            order = np.concatenate([[0], rng.permutation(20) + 1]).astype(np.uint8)
            spot = rng.integers(5, 25, 2)
            for ids in predictions:
                ids[:] = order[ids]
                ids[spot[0] : spot[0] + 6, spot[1] : spot[1] + 6] = order[9]
    scores, measured, _ = score(TASKS[task](), *write_task(tmp_path, task, held))
    expected = {name: official_sequence(task, *maps) for name, maps in held.items()}
    assert list(scores) == list(KEYS)
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
    scores, measured, _ = score(Davis2016(), root, results)
    rows = []
    for references, predictions in held.values():
        masks = [(a > 0, b > 0) for a, b in zip(references[1:-1], predictions[1:-1], strict=True)]
        pairs = [
            [measure(*pair, np.zeros(pair[0].shape, bool)) for pair in masks]
            for measure in (official_region, official_boundary)
        ]
        rows.append([value for series in pairs for value in official_statistics(np.array(series))])
    assert scores == pytest.approx(mean_scores(rows), abs=1e-12)
    assert measured["plain"].details["frames"] == 7


def test_davis2016_accepts_any_foreground_value(tmp_path):
    held = {"a": (moving_squares(1, 5, (30, 40), 1),) * 2}
    root, results = write_task(tmp_path, "davis2016", held)
    for index, ids in enumerate(held["a"][0]):
        kinds = [np.dstack([ids * 0, ids * 255, ids]), ids * 255, ids > 0, ids, ids.astype(np.uint16) * 256]
        write(results / "a" / f"{index:05d}.png", kinds[index], palette=False)
    assert score(Davis2016(), root, results)[0]["J&F-Mean"] == 1.0


def test_a_perfect_prediction_scores_one(tmp_path):
    held = {
        name: (references, [np.where(ids == 255, 0, ids) for ids in references])
        for name, (references, _) in sequences().items()
    }
    del held["late"]  # its later ids are no objects, and refused
    scores, *_ = score(Davis2017(), *write_task(tmp_path, "davis2017", held))
    assert scores == {key: 0.0 if key.endswith("Decay") else 1.0 for key in KEYS}


def test_resampled_sequences_weigh_by_their_objects(tmp_path):
    protocol = Davis2017()
    _, _, sums = score(protocol, *write_task(tmp_path, "davis2017", sequences()))
    weights = np.array([[1, 1, 1, 1, 1], [2, 0, 0, 3, 0], [0, 0, 0, 0, 0]])
    scores = protocol.scores(weights @ sums)
    assert all(value.shape == (3,) for value in scores.values())
    rows = sums[[0, 0, 3, 3, 3]].sum(axis=0)
    assert scores["J-Mean"][1] == pytest.approx(rows[0] / rows[-1], abs=1e-15)
    assert all(np.isnan(value[2]) for value in scores.values())
    assert protocol.per_class(sums.sum(axis=0)) == []


@pytest.mark.parametrize("task", ["davis2017", "davis2016"])
@pytest.mark.parametrize("length", [1, 2])
def test_sequences_without_a_scored_frame_add_nothing(tmp_path, task, length):
    held = three_frames()
    held["tiny"] = tuple(frames[:length] for frames in held["short"])
    root, results = write_task(tmp_path, task, held)
    protocol = TASKS[task]()
    found = protocol.find(root, results)
    assert [case.name for case in found.cases] == ["short", "tiny"]
    assert any("tiny" in note and "adds no object" in note for note in found.notes)
    scores, measured, sums = score(protocol, root, results)
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
    scored = run_score(protocol, protocol.find(root, results), where="W", workers=1)
    result, gap = summary(protocol, scored), difference(protocol, scored, scored)
    write_set(root, "2016" if task == "davis2016" else "2017", ["plain", "other"])
    few = summary(protocol, run_score(protocol, protocol.find(root, results), where="W", workers=1))
    assert result["n"] == few["n"] == gap["J-Mean"]["n"] == 2 and len(result["per_video"]) == len(held)
    assert result["ci95"] == few["ci95"] and result["unit"] == "sequence"


@pytest.mark.parametrize("length", [1, 2])
def test_unsupervised_scores_every_frame_of_short_sequences(tmp_path, length):
    held = {"tiny": tuple(frames[:length] for frames in three_frames()["short"])}
    scores, *_ = score(Davis2017Unsupervised(), *write_task(tmp_path, "davis2017_unsupervised", held))
    assert scores == pytest.approx(mean_scores(official_sequence("davis2017_unsupervised", *held["tiny"])), abs=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_sequences_without_objects_add_no_object(tmp_path, task):
    empty = [np.zeros((20, 30), np.uint8)] * 4
    held = {"none": (empty, empty)} | three_frames()
    protocol = TASKS[task]()
    _, measured, _ = score(protocol, *write_task(tmp_path, task, held))
    expected = [0.0] * 7 if task != "davis2016" else [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert measured["none"].sums.tolist() == expected


def test_vanished_object_gets_no_credit_for_an_empty_proposal(tmp_path):
    references = moving_squares(1, 8, (30, 40), 1, gone=(1,))
    elsewhere = [np.zeros((30, 40), np.uint8) for _ in references]
    for ids in elsewhere:
        ids[25:, 30:] = 1
    held = {"wrong": (references, elsewhere)}
    root, results = write_task(tmp_path, "davis2017_unsupervised", held)
    assert score(Davis2017Unsupervised(), root, results)[0]["J-Mean"] == 0.0
    for ids in elsewhere:
        ids[ids > 0] = 2  # id 1 is now an empty proposal, right in all frames but the first
    write_frames(results / "wrong", elsewhere)
    scores = score(Davis2017Unsupervised(), root, results)[0]
    assert scores["J-Mean"] == 7 / 8
    assert scores == pytest.approx(
        mean_scores(official_sequence("davis2017_unsupervised", references, elsewhere)), abs=1e-12
    )


def test_proposals_in_a_sequence_without_objects_are_free(tmp_path):
    held = {"none": ([np.zeros((20, 30), np.uint8)] * 2, moving_squares(1, 2, (20, 30), 2))}
    root, results = write_task(tmp_path, "davis2017_unsupervised", held)
    protocol = Davis2017Unsupervised()
    assert protocol.measure(protocol.find(root, results).cases[0]).sums.tolist() == [0.0] * 7


@pytest.mark.parametrize("ids", [[3], [4, 200], [255]])
def test_ids_above_the_objects_are_named(tmp_path, ids):
    held = three_frames()
    held["short"][1][1][0, : len(ids)] = ids
    root, results = write_task(tmp_path, "davis2017", held)
    with pytest.raises(BadFile) as error:
        Davis2017().measure(Davis2017().find(root, results).cases[0])
    assert error.value.path == results / "short" / "00001.png"
    assert f"the ids {', '.join(map(str, ids))} in" in str(error.value)
    assert "1 to 2" in str(error.value)


def test_the_skipped_frames_are_not_read(tmp_path):
    root, results = write_task(tmp_path, "davis2017", three_frames())
    (results / "short" / "00000.png").unlink()
    (results / "short" / "00002.png").write_bytes(b"nothing")
    assert score(Davis2017(), root, results)[0]["J-Mean"] > 0


def test_more_proposals_than_allowed_are_named(tmp_path):
    held = three_frames()
    held["short"][1][2][0, :2] = [20, 21]
    root, results = write_task(tmp_path, "davis2017_unsupervised", held)
    protocol = Davis2017Unsupervised()
    case = protocol.find(root, results).cases[0]
    with pytest.raises(BadFile, match=r"00002.png: holds the ids 21 in .* 1 to 20"):
        protocol.measure(case)
    assert Davis2017Unsupervised(max_proposals=21).measure(case).sums[-1] == 2
    assert "not official" in Davis2017Unsupervised(max_proposals=21).rules["proposals"]


@pytest.mark.parametrize("task", TASKS)
def test_another_size_is_refused(tmp_path, task):
    held = three_frames()
    held["short"][1][1] = held["short"][1][1][:, :-1]
    root, results = write_task(tmp_path, task, held)
    protocol = TASKS[task]()
    with pytest.raises(BadFile, match=r"00001.png: is 49 x 40 \(width x height\), its reference 50 x 40"):
        protocol.measure(protocol.find(root, results).cases[0])


@pytest.mark.parametrize("task", TASKS)
def test_unreadable_files_are_named(tmp_path, task):
    root, results = write_task(tmp_path, task, three_frames())
    protocol = TASKS[task]()
    for path in (results / "short" / "00001.png", root / MASKS[task] / "480p" / "short" / "00001.png"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BadFile) as error:
            protocol.measure(protocol.find(root, results).cases[0])
        assert error.value.path == path
        path.write_bytes(whole)


@pytest.mark.parametrize("task", ["davis2017", "davis2017_unsupervised"])
def test_colours_are_no_ids(tmp_path, task):
    root, results = write_task(tmp_path, task, three_frames())
    write(results / "short" / "00001.png", np.zeros((40, 50, 3), np.uint8), palette=False)
    protocol = TASKS[task]()
    with pytest.raises(BadFile, match="00001.png: has 3 channels"):
        protocol.measure(protocol.find(root, results).cases[0])


@pytest.mark.parametrize("task", TASKS)
def test_a_bad_file_leaves_its_sequence_out(tmp_path, task):
    held = {"bad": sequences()["plain"]} | three_frames()
    held["bad"][1][3] = held["bad"][1][3][1:]
    root, results = write_task(tmp_path, task, held)
    protocol = TASKS[task]()
    with pytest.raises(BadFile) as error:
        protocol.measure(protocol.find(root, results).cases[0])
    assert error.value.path == results / "bad" / "00003.png" and "its reference" in error.value.reason
    copy = pickle.loads(pickle.dumps(error.value))
    assert (copy.path, copy.reason, str(copy)) == (error.value.path, error.value.reason, str(error.value))
    problems = [(error.value.path, error.value.reason)]
    with pytest.raises(Unscorable) as stopped:
        run_score(protocol, protocol.find(root, results), where="here", workers=1)
    assert stopped.value.problems == problems
    left = run_score(protocol, protocol.find(root, results), where="here", workers=1, on_error="skip")
    assert (left.units, left.problems) == (["short"], problems)


@pytest.mark.parametrize("side", ["reference", "prediction"])
def test_an_unreadable_file_of_a_sequence_is_named(tmp_path, side):
    root, results = write_task(tmp_path, "davis2017", {"bad": sequences()["plain"]})
    path = {"reference": root / MASKS["davis2017"] / "480p/bad/00000.png", "prediction": results / "bad/00002.png"}[
        side
    ]
    path.write_bytes(path.read_bytes()[:50])
    protocol = TASKS["davis2017"]()
    with pytest.raises(BadFile) as error:
        protocol.measure(protocol.find(root, results).cases[0])
    assert error.value.path == path


@pytest.mark.parametrize("split", ["test-dev", "test-challenge"])
def test_the_unsupervised_test_sets_are_lists_of_2019(tmp_path, split):
    held = three_frames() | {"other": three_frames()["short"]}
    root, results = write_task(tmp_path, "davis2017_unsupervised", held)
    write_frames(root / "Annotations/480p/other", held["other"][0])
    write_set(root, "2017", ["other"], split=split)
    with pytest.raises(UserError, match=f"holds no ImageSets/2019/{split}.txt; ImageSets holds 2017"):
        Davis2017Unsupervised(split=split).find(root, results)
    write_set(root, "2019", ["short"], split=split)
    assert [case.name for case in Davis2017Unsupervised(split=split).find(root, results).cases] == ["short"]
    assert [case.name for case in Davis2017(split=split).find(root, results).cases] == ["other"]
    assert [case.name for case in Davis2017Unsupervised().find(root, results).cases] == ["short", "other"]


@pytest.mark.parametrize("task", TASKS)
def test_rules_state_when_the_official_decay_fails(task):
    assert [rule for rule in TASKS[task]().rules["differs"] if rule.startswith("from 256 evaluated frames on")]
    values = np.linspace(1, 0, 256)
    assert official_statistics(values[:255], np.uint8) == pytest.approx(official_statistics(values[:255]))
    assert not official_statistics(values, np.uint8)[2] == pytest.approx(official_statistics(values)[2])


def test_davis2016_masks_are_recognised(tmp_path):
    held = {"a": ([ids * 255 for ids in moving_squares(1, 4, (30, 40), 1)], moving_squares(1, 4, (30, 40), 1))}
    root, results = write_task(tmp_path, "davis2017", held)
    with pytest.raises(BadFile, match="holds only void .* with davis2016"):
        Davis2017().measure(Davis2017().find(root, results).cases[0])


def test_ids_of_16_bits_are_refused_in_the_first_frame(tmp_path):
    held = {
        "a": (
            [ids.astype(np.uint16) * 300 for ids in moving_squares(1, 3, (30, 40), 1)],
            moving_squares(1, 3, (30, 40), 1),
        )
    }
    root, results = tmp_path / "DAVIS", tmp_path / "results"
    write_set(root, "2017", held)
    write_frames(root / "Annotations/480p/a", held["a"][0], palette=False)
    write_frames(results / "a", held["a"][1])
    with pytest.raises(BadFile, match="00000.png: holds the ids 300 in .* 1 to 254"):
        Davis2017().measure(Davis2017().find(root, results).cases[0])


def test_each_missing_file_is_a_problem(tmp_path):
    root, results = write_task(tmp_path, "davis2017", sequences())
    (results / "plain" / "00003.png").unlink()
    (results / "plain" / "00004.png").unlink()
    shutil.rmtree(results / "gone")
    shutil.rmtree(root / "Annotations/480p/void")
    write(results / "late" / "00007.png", np.zeros((5, 5), np.uint8))
    write(results / "other" / "00000.png", np.zeros((5, 5), np.uint8))
    write(results / "late" / "._00001.png", np.zeros((5, 5), np.uint8))
    found = Davis2017().find(root, results)
    assert [case.name for case in found.cases] == ["late", "hole"]
    problems = {path.relative_to(tmp_path).as_posix(): reason for path, reason in found.problems}
    assert list(problems) == [
        "results/plain/00003.png",
        "results/plain/00004.png",
        "results/gone",
        "DAVIS/Annotations/480p/void",
    ]
    assert all(reason.rstrip().endswith(".") for reason in problems.values())
    assert [note for note in found.notes if "other" in note and "not in val" in note]
    assert [note for note in found.notes if "00007.png" in note]
    assert not any("._" in note for note in found.notes)


def test_the_set_decides_and_its_ways_to_be_written(tmp_path):
    held = sequences()
    root, results = write_task(tmp_path, "davis2016", held, year="480p")
    lines = [
        f"/JPEGImages/480p/{name}/{i:05d}.jpg /Annotations/480p/{name}/{i:05d}.png"
        for name in ("hole", "gone")
        for i in range(3)
    ]
    write_set(root, "480p", lines)
    assert [case.name for case in Davis2016().find(root, results).cases] == ["hole", "gone"]
    write_set(root, "2016", ["\ufefflate\r", "", " plain ", "late"])
    assert [case.name for case in Davis2016().find(root, results).cases] == ["late", "plain"]
    write_set(root, "2016", ["void"], split="mine")
    assert [case.name for case in Davis2016(split="mine").find(root, results).cases] == ["void"]


def test_resolution_selects_the_annotation_folder(tmp_path):
    root, results = write_task(tmp_path, "davis2017", three_frames())
    shutil.move(root / "Annotations/480p", root / "Annotations/Full-Resolution")
    assert Davis2017(resolution="Full-Resolution").find(root, results).cases
    with pytest.raises(UserError, match="^resolution=480p: .* does not hold this folder; it holds Full-Resolution"):
        Davis2017().find(root, results)


def test_folders_without_davis_are_refused(tmp_path):
    root, results = write_task(tmp_path, "davis2017", three_frames())
    with pytest.raises(UserError, match="holds no Annotations_unsupervised"):
        Davis2017Unsupervised().find(root, results)
    with pytest.raises(
        UserError, match=f"reference={results} is not the root of DAVIS: it holds no ImageSets/2017/val.txt"
    ):
        Davis2017().find(results, results)
    with pytest.raises(UserError, match=f"Try reference={root}"):
        Davis2017().find(root / "Annotations" / "480p", results)
    with pytest.raises(UserError, match="^split=train: .* does not hold this list; it holds val"):
        Davis2017(split="train").find(root, results)
    with pytest.raises(UserError, match="holds no ImageSets/2016/val.txt; ImageSets holds 2017"):
        Davis2016().find(root, results)
    with pytest.raises(UserError, match="is not a folder"):
        Davis2017().find(root, tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no folder of a sequence in val. Give the folder that holds short/"):
        Davis2017().find(root, tmp_path)
    shutil.move(root / "ImageSets/2017", root / "ImageSets/2016")
    with pytest.raises(UserError, match="ImageSets holds 2016. Score it with davis2016"):
        Davis2017().find(root, results)
    write_set(root, "2017", [""])
    with pytest.raises(UserError, match="is empty"):
        Davis2017().find(root, results)
    for line in ("..", ".", "../short", "/etc", "a/b", "a/../00000.jpg", "/Annotations/480p/../00000.png", "a\0b"):
        write_set(root, "2017", [line])
        with pytest.raises(UserError, match="names no sequence"):
            Davis2017().find(root, results)


@pytest.mark.parametrize("value", [0, 256, True])
def test_the_number_of_proposals_is_checked(value):
    with pytest.raises(UserError, match=rf"^max_proposals={value} is .* Give a whole number( from 1 to 255)?\."):
        Davis2017Unsupervised(max_proposals=value)


@pytest.mark.parametrize("task", TASKS)
def test_names_are_checked(task):
    for options in ({"split": ""}, {"split": "a/b"}, {"resolution": ".."}, {"resolution": 480}):
        with pytest.raises(UserError, match=f"^{next(iter(options))}=.* (is not a valid name|Give text)"):
            TASKS[task](**options)


@pytest.mark.parametrize("task", TASKS)
def test_the_config_makes_the_protocol(task):
    node = OmegaConf.load(Path(dinoseg.__file__).parent / "cfg" / "protocol" / f"{task}.yaml")
    protocol = instantiate(node)
    assert type(protocol) is TASKS[task]
    assert (protocol.name, protocol.unit, protocol.keys) == (task, "sequence", KEYS)
    assert {"absent_class", "resolution", "ignore", "aggregation", "version", "differs"} <= protocol.rules.keys()
    assert vars(protocol)["layout"] == TASKS[task]().layout


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="no DAVIS-2016 here")
def test_real_sequences(tmp_path):
    masks = DATA / "Annotations" / "480p"
    protocol = Davis2016()
    scores, *_ = score(protocol, DATA, masks)
    assert scores == {key: 0.0 if key.endswith("Decay") else 1.0 for key in KEYS}
    name = "blackswan"
    root = tmp_path / "DAVIS"
    write_set(root, "2016", [name])
    frames = [np.array(Image.open(path)) for path in sorted((masks / name).glob("*.png"))[:5]]
    shifted = [np.roll(ids, (6, -9), (0, 1)) for ids in frames]
    write_frames(root / "Annotations/480p" / name, frames)
    write_frames(tmp_path / "results" / name, shifted)
    pairs = [(a > 0, b > 0, np.zeros(a.shape, bool)) for a, b in zip(frames[1:-1], shifted[1:-1], strict=True)]
    expected = [
        value
        for measure in (official_region, official_boundary)
        for value in official_statistics(np.array([measure(*pair) for pair in pairs]))
    ]
    assert score(protocol, root, tmp_path / "results")[0] == pytest.approx(mean_scores([expected]), abs=1e-15)


@pytest.mark.parametrize("task", TASKS)
def test_folders_of_masks_of_one_video_are_scored(tmp_path, task):
    held = sequences()
    root, results = write_task(tmp_path, task, held)
    protocol, masks = TASKS[task](), root / MASKS[task] / "480p/gone"
    expected = score(protocol, root, results)[1]["gone"]
    shutil.copytree(results / "gone", tmp_path / "mine")
    _, measured, _ = score(protocol, masks, tmp_path / "mine")
    assert list(measured) == ["gone"] and np.array_equal(measured["gone"].sums, expected.sums)
    assert np.array_equal(score(protocol, root, results / "gone")[1]["gone"].sums, expected.sums)
    pair = [
        run_score(protocol, protocol.find(masks, each), where="W", workers=1) for each in (tmp_path / "mine", masks)
    ]
    gap = difference(protocol, *pair)["J-Mean"]
    assert gap["value"] > 0 and gap["n"] == 1 and gap["ci95"] is None
    with pytest.raises(UserError, match="masks of one video, mine, which is not a sequence in"):
        protocol.find(root, tmp_path / "mine")
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
    _, measured, _ = score(protocol, root, results)
    found, alone, _ = score(protocol, root, run / "masks")
    assert list(alone) == ["gone"] and np.array_equal(alone["gone"].sums, measured["gone"].sums)
    (note,) = protocol.find(root, run / "masks").notes
    assert note == f"{run}/masks: masks of one sequence, gone; others of val are not scored"
    masks = root / "Annotations/480p/gone"  # a video of one's own, whose masks lie in a folder
    other = write_tracking_run(tmp_path / "own", held["gone"][1], "clips/own.mp4") / "masks"
    assert score(protocol, masks, other)[0] == found and list(score(protocol, masks, other)[1]) == ["gone"]
    with pytest.raises(UserError, match="masks of one video, own, which is not a sequence in"):
        protocol.find(root, other)
    with pytest.raises(UserError, match="holds no masks. Give a folder of PNG masks"):
        protocol.find(tmp_path, other)
    (other.parent / "track.json").write_text("{}")
    with pytest.raises(UserError, match=r"track.json is damaged \(.*input"):
        protocol.find(masks, other)
