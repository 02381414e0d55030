"""HOTA and track AP: equal to a plain count and to numbers of the official code; files of both formats and errors."""

import json
import subprocess
import sys

import numpy as np
import pytest
from command_line import call
from drawn_objects import encode
from drawn_tracks import CLASSES, as_youtube_vis, draw_videos, separate, write_mots, write_youtube_vis
from plain_precision import plain_ap
from scipy.optimize import linear_sum_assignment

from dinoseg.core.metric import RowMetric
from dinoseg.extensions.protocols.folders import score_cases
from dinoseg.extensions.protocols.summary import summary
from dinoseg.extensions.tracks.protocol import TrackProtocol

NAMES = ("HOTA", "DetA", "AssA", "LocA", "DetRe", "DetPr", "AssRe", "AssPr")
SIZES = {"": (0, 1e10), "s": (0, 128**2), "m": (128**2, 256**2), "l": (256**2, 1e10)}
# means over alphas and classes of TrackEval 12c8791, and AP to APm of YTVOSeval f3f9948, for `draw_videos(7)`
OFFICIAL = [0.4672182906347708, 0.3043691072970505, 0.8016132502974608, 0.8122477287278629]
OFFICIAL += [0.4795321637426899, 0.4138370118845501, 0.8206399837978785, 0.9401629072681705]
OFFICIAL_AP = [0.3202946723243752, 0.5521216407355021, 0.29669966996699665, 0.06155115511551155, 0.7252475247524752]
NAMED = {"categories": {1: "car", 2: "person"}}


def score(reference, prediction, **options):
    protocol = TrackProtocol(**options)
    return protocol, score_cases(protocol, protocol.find(reference, prediction), where="both", workers=1)


def find_iou(first, second):
    union = (first | second).sum()
    return (first & second).sum() / union if union else 0.0


def find_ious(held, found):
    values = [find_iou(first, second) for first in held.values() for second in found.values()]
    return np.array(values).reshape(len(held), len(found))


def match(values):
    return list(zip(*linear_sum_assignment(-values), strict=True))


def drop_ignored(held, found, region):
    """Return the tracks whose masks (by track) match an annotation, or lie to at most half in the region."""
    values = find_ious(held, found)
    pairs = match(np.where(values < 0.5 - 1e-15, -10000, values))
    matched = {[*found][column] for row, column in pairs if values[row, column] >= 0.5 - 1e-15}
    return {
        track: mask
        for track, mask in found.items()
        if track in matched or (mask & region).sum() <= 0.5 * max(mask.sum(), 1)
    }


def plain_counts(videos, label, alpha):
    """Return matches, misses, false positives and sums over matches: AssA, AssRe, AssPr and IoU; in loops."""
    total = np.zeros(7)
    for _, _, length, *sides, regions in videos:
        frames = []
        for time in range(length):
            held, found = (
                {track: masks[time] for track, (own, masks) in enumerate(side) if own == label and time in masks}
                for side in sides
            )
            frames.append((held, drop_ignored(held, found, regions[time]) if time in regions else found))
        lengths = [
            [sum(track in frame[side] for frame in frames) for track in range(len(sides[side]))] for side in (0, 1)
        ]
        shared = np.zeros((len(sides[0]), len(sides[1])))
        for held, found in frames:
            for a in held:
                for b in found:
                    iou = find_iou(held[a], found[b])
                    whole = sum(find_iou(held[a], each) for each in found.values()) - iou
                    whole += sum(find_iou(each, found[b]) for each in held.values())
                    shared[a, b] += iou / whole if whole else 0
        matches = {}
        for held, found in frames:
            ious = find_ious(held, found)
            alike = [[shared[a, b] / (lengths[0][a] + lengths[1][b] - shared[a, b]) for b in found] for a in held]
            pairs = match(np.array(alike).reshape(ious.shape) * ious) if held and found else []
            pairs = [(row, column) for row, column in pairs if ious[row, column] >= alpha - 1e-15]
            total[:3] += len(pairs), len(held) - len(pairs), len(found) - len(pairs)
            for row, column in pairs:
                key = [*held][row], [*found][column]
                matches[key] = matches.get(key, 0) + 1
                total[6] += ious[row, column]
        for (a, b), count in matches.items():
            wholes = (lengths[0][a] + lengths[1][b] - count, lengths[0][a], lengths[1][b])
            total[3:6] += [count * count / whole for whole in wholes]
    return total


def plain_parts(total):
    hits, misses, invented, *sums = total
    found = hits / max(1, hits + misses + invented)
    association, recall, precision = (each / max(1, hits) for each in sums[:3])
    shares = hits / max(1, hits + misses), hits / max(1, hits + invented)
    located = sums[3] / hits if hits else 1
    return [(found * association) ** 0.5, found, association, located, *shares, recall, precision]


def check_hota(result, videos):
    counts = {label: np.array([plain_counts(videos, label, 0.05 * step) for step in range(1, 20)]) for label in (1, 2)}
    counts = {label: each for label, each in counts.items() if each[0, :3].any()}
    means = {label: np.mean([plain_parts(total) for total in each], axis=0) for label, each in counts.items()}
    for row in result["per_class"]:
        assert [row[name] for name in NAMES] == pytest.approx([*means.get(row["id"], [None] * 8)], abs=1e-12)
    if counts:
        assert [result["scores"][name] for name in NAMES] == pytest.approx(
            np.mean([*means.values()], axis=0), abs=1e-12
        )
        pooled = np.mean([plain_parts(total) for total in sum(counts.values())], axis=0)
        assert [result["scores"][f"{name}_pooled"] for name in NAMES] == pytest.approx(pooled, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_hota_of_mots_equals_a_plain_count(tmp_path, seed):
    videos = separate(draw_videos(seed))
    write_mots(tmp_path, videos)
    result = summary(*score(tmp_path / "gt", tmp_path / "found", **NAMED))
    check_hota(result, videos)
    assert result["scores"]["AP"] is None  # MOTS has no scores


@pytest.mark.parametrize("seed", range(20))
def test_scores_of_youtube_vis_equal_a_plain_count(tmp_path, seed):
    videos = [(*video[:5], {}) for video in draw_videos(seed)]
    reference, results = as_youtube_vis(videos, seed)
    write_youtube_vis(tmp_path, reference, results)
    result = summary(*score(tmp_path / "gt.json", tmp_path / "results.json"))
    check_hota(result, videos)
    for is_result, entries in enumerate((reference["annotations"], results)):
        for entry, (size, length, masks) in zip(
            entries,
            [(size, length, masks) for _, size, length, *sides, _ in videos for _, masks in sides[is_result]],
            strict=True,
        ):
            entry["image_id"] = entry["video_id"]
            empty = np.zeros(size, bool)
            entry["mask"] = np.concatenate([masks.get(frame, empty) for frame in range(length)], axis=1)
            areas = [mask.sum() if is_result else 1000 * mask.sum() for mask in masks.values() if mask.any()]
            entry["area"] = np.mean(areas or [0])
    whole = {**reference, "images": reference["videos"]}
    expected = {name: [] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    for category in CLASSES:
        for size, limits in SIZES.items():
            levels = np.linspace(0.5, 0.95, 10)
            values = [plain_ap(whole, results, category, limits, level, by_share=False) for level in levels]
            if values[0] is not None:
                expected[f"AP{size}"].append(np.mean(values))
                expected["AP50"] += [values[0]] * (size == "")
                expected["AP75"] += [values[5]] * (size == "")
    for name, values in expected.items():
        assert result["scores"][name] == pytest.approx(np.mean(values) if values else None, abs=1e-12)


def test_leaving_out_videos_equals_a_new_computation(tmp_path):
    write_youtube_vis(tmp_path, *as_youtube_vis([each for seed in range(4) for each in draw_videos(seed)]))
    protocol, scored = score(tmp_path / "gt.json", tmp_path / "results.json")
    rows = [measured.rows for _, measured in scored.cases]
    units = [place // 2 for place in range(len(rows))]
    expected = RowMetric.leave_one_out(protocol.metric, rows, units)
    for name, values in protocol.metric.leave_one_out(rows, units).items():
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-12)


def test_scores_are_printed_and_written_without_torch(tmp_path):
    write_mots(tmp_path, separate(draw_videos(1)))
    code = "import sys; sys.modules['torch'] = None; from dinoseg.__main__ import main; main()"
    words = (
        "mode=score",
        "protocol=tracks",
        "reference=gt",
        "prediction=gt",
        "protocol.categories={1: car, 2: person, 10: region}",
    )
    words += ("mode.workers=1", "hydra.run.dir=run", "protocol.ignore_id=null")
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run/scores.json").read_text())["scores"]
    assert scores["HOTA"] == scores["AssA_pooled"] == 1 and "100.00" in done.stdout


def test_scores_equal_the_official_code(tmp_path):
    videos = draw_videos(7)
    write_mots(tmp_path, separate(videos))
    scores = summary(*score(tmp_path / "gt", tmp_path / "found", **NAMED))["scores"]
    assert [scores[name] for name in NAMES] == pytest.approx(OFFICIAL, abs=1e-12)
    for order in (1, -1):  # equal scores are in the order of ids
        reference, results = as_youtube_vis(videos, 7)
        reference["videos"] = reference["videos"][::order]
        write_youtube_vis(tmp_path, reference, results)
        scores = summary(*score(tmp_path / "gt.json", tmp_path / "results.json"))["scores"]
        assert [scores[name] for name in ("AP", "AP50", "AP75", "APs", "APm")] == pytest.approx(OFFICIAL_AP, abs=1e-12)


def test_ranges_of_areas_share_their_ends(tmp_path):
    reference, results = as_youtube_vis([("a", (12, 15), 1, *[[(1, {0: np.ones((12, 15), bool)})]] * 2, {})])
    for area, expected in ((128**2, (1, 1, None)), (256**2, (None, 1, 1))):
        reference["annotations"][0].update(areas=[area], iscrowd=0)
        write_youtube_vis(tmp_path, reference, results)
        scores = summary(*score(tmp_path / "gt.json", tmp_path / "results.json"))["scores"]
        assert tuple(scores[name] for name in ("APs", "APm", "APl")) == pytest.approx(expected)


def test_ids_of_a_reference_are_its_classes_without_regions(tmp_path):
    videos = separate(draw_videos(7))
    write_mots(tmp_path, videos)
    result = summary(*score(tmp_path / "gt", tmp_path / "found"))
    assert [(row["id"], row["name"]) for row in result["per_class"]] == [(1, "1"), (2, "2")]
    check_hota(result, videos)


def test_files_without_tracks_have_no_score(tmp_path):
    for side in ("gt", "found"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.txt").touch()
    assert summary(*score(tmp_path / "gt", tmp_path / "found"))["scores"]["HOTA"] is None


def test_track_of_a_video_without_frames_is_missed(tmp_path):
    track = {"category_id": 1, "video_id": 1, "segmentations": []}
    reference = {
        "videos": [{"id": 1, "height": 4, "width": 5, "file_names": []}],
        "categories": [{"id": 1, "name": "car"}],
        "annotations": [{**track, "id": 1, "areas": []}],
    }
    write_youtube_vis(tmp_path, reference, [{**track, "score": 1}])
    scores = summary(*score(tmp_path / "gt.json", tmp_path / "results.json"))["scores"]
    assert scores["AP"] == 0 and scores["HOTA"] is None


def check_error(folder, words, expected):
    done = call(folder, "mode=score", "protocol=tracks", *words, "mode.workers=1")
    assert done.status == 1 and expected in done.err and "Traceback" not in done.err, done.err


LINE = f"0 1000 1 4 5 {encode(np.eye(4, 5))['counts']}\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LINE * 2, "found/a.txt: the id 1000 occurs twice in frame 0"),
        (LINE + LINE.replace("1000", "1001"), "found/a.txt: masks of frame 0 overlap"),
        (LINE.replace("4 5", "5 4"), "found/a.txt: line 1: its mask has the size [5, 4], its image [4, 5]"),
        (LINE.replace("1000 1", "2000 2"), "line 1: its category_id is 2, which is not in the categories of the refer"),
        (LINE + "1 1000 1 4\n", "found/a.txt: line 2 is 1 1000 1 4: give"),
        (LINE.replace("0 1000", "-1 1000"), "line 1 is -1 1000 1 4 5"),
        (LINE.replace("1000 1", f"{2**31} 1"), "line 1 is 0 2147483648"),
        (LINE.replace("4 5", "0 5"), "line 1 is 0 1000 1 0 5"),
        ("\xe9", "found/a.txt: a file of MOTS is ASCII text"),
        (None, "found/a.txt: is missing; the file of a video without tracks is empty"),
    ],
)
def test_wrong_text_files_are_named_in_one_sentence(tmp_path, content, expected):
    for name, text in (("gt/a", LINE), ("found/a", content), ("found/b", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if text is not None:
            (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    check_error(tmp_path, ("reference=gt", "prediction=found"), expected)


def test_folders_without_text_files_are_refused(tmp_path):
    write_mots(tmp_path, draw_videos(7))
    (tmp_path / "none").mkdir()
    check_error(tmp_path, ("reference=gt", "prediction=none"), "none has no file NAME.txt of MOTS")
    write_youtube_vis(tmp_path, *as_youtube_vis(draw_videos(7)))
    check_error(tmp_path, ("reference=gt.json", "prediction=none"), "prediction=none has no JSON file")
    (tmp_path / "loop.json").symlink_to("loop.json")
    check_error(tmp_path, ("reference=gt.json", "prediction=loop.json"), "prediction=loop.json is not a file")
    for given, expected in (
        ("{a: car}", "protocol.categories={'a': 'car'}: give a whole number"),
        ("{1: car, 10: region}", "protocol.ignore_id=10 is a class of categories, too"),
    ):
        check_error(tmp_path, ("reference=gt", "prediction=found", f"protocol.categories={given}"), expected)


@pytest.mark.parametrize(
    ("side", "values", "expected"),
    [
        ("results", {"segmentations": [None]}, "video 1, result 1 has 1 segmentations and"),
        ("results", {"video_id": 9}, "video 9, result 1: the video is not in gt.json"),
        ("results", {"category_id": 9}, "its category_id is 9, which is not in the categories of the reference"),
        ("results", {"score": "high"}, "its score is 'high': give a finite number"),
        ("annotations", {"areas": []}, "gt.json: video 1, annotation 1 has 4 segmentations and 0 areas"),
        ("annotations", {"id": 2}, "gt.json: 2 annotations have the id 2"),
        ("videos", {"height": 11}, "its mask has the size [12, 15], its image [11, 15]"),
        ("videos", {"height": -1}, "gt.json: video 1: height -1 and width 15 are not an image size"),
        ("categories", {"id": "1"}, "reference=gt.json is not the JSON file of YouTube-VIS annotations"),
    ],
)
def test_wrong_json_files_are_named_in_one_sentence(tmp_path, side, values, expected):
    reference, results = as_youtube_vis(draw_videos(7))
    (results if side == "results" else reference[side])[0].update(values)
    write_youtube_vis(tmp_path, reference, results)
    check_error(tmp_path, ("reference=gt.json", "prediction=results.json"), expected)


def test_results_of_several_files_are_joined(tmp_path):
    reference, results = as_youtube_vis(draw_videos(7))
    write_youtube_vis(tmp_path, reference, results)
    whole = summary(*score(tmp_path / "gt.json", tmp_path / "results.json"))
    (tmp_path / "parts").mkdir()
    for number in (1, 2):
        part = [each for each in results if (each["video_id"] == 1) == (number == 1)]
        (tmp_path / f"parts/{number}.json").write_text(json.dumps(part))
    assert summary(*score(tmp_path / "gt.json", tmp_path / "parts"))["scores"] == whole["scores"]
    (tmp_path / "parts/1.json").unlink()
    assert "all objects of this video are missed" in score(tmp_path / "gt.json", tmp_path / "parts")[1].notes[0]
