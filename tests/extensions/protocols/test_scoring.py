"""From cases to scores: sums over units, intervals, paired differences, and files that cannot be scored."""

import pickle
import re
import time
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from mistakes import assert_refused
from scipy import special, stats

from dinoseg.evaluation.scoring import intervals
from dinoseg.evaluation.scoring.intervals import Estimate, estimate_difference, holm, jackknife, score_units
from dinoseg.extensions.protocols import folders
from dinoseg.extensions.protocols.contract import BadFile, Cases, Measured, ScoringCase, SumProtocol
from dinoseg.extensions.protocols.folders import Unscorable, score_cases
from dinoseg.extensions.protocols.summary import difference, summary
from dinoseg.extensions.protocols.video_clustering import VideoClustering
from dinoseg.report.table import difference_table, scores_table
from dinoseg.utils.errors import UserError


class Share(SumProtocol):
    """Hits among tries, written in a case's file as `hits-tries`; the mean over units is a second score."""

    name = "share"
    unit = "video"
    keys = ("share", "mean")
    rules = {"version": "1"}
    unbounded = ("mean",)

    def find(self, reference, prediction):
        raise NotImplementedError

    def measure(self, case):
        if "bad" in f"{case.name} {case.files[0][0]}":
            raise BadFile(Path(case.name), "it is bad")
        hits, tries = map(int, case.files[0][0].name.split("-"))
        return Measured(np.array([hits, tries]), {"tries": tries, "word": "x"})

    def join(self, measured):
        hits, tries = super().join(measured)
        return np.array([hits, tries, hits / tries, 1.0])

    def scores(self, sums):
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"share": sums[..., 0] / sums[..., 1], "mean": sums[..., 2] / sums[..., 3]}

    def per_class(self, sums):
        return [{"id": 0, "name": "hit", "hits": sums[0]}]


def cases(*words, frames=1):
    """Return cases of `unit/stem=hits-tries`, or `unit/hits-tries` where nothing else shares the numbers."""
    found = Cases([])
    for word in words:
        name, _, numbers = word.partition("=")
        file = Path(numbers or name.partition("/")[2])
        found.cases.append(ScoringCase(name, name.split("/")[0], ((file, None),) * frames))
    return found


def scored_cases(*words, **options):
    return score_cases(Share(), cases(*words), where="P", **options)


class Pooled(Share):
    """Hits among tries, pooled over all files; a file without tries adds nothing."""

    unit = "image"
    keys = ("share",)
    unbounded = ()
    join = SumProtocol.join

    def scores(self, sums):
        with np.errstate(invalid="ignore"):
            return {"share": sums[..., 0] / sums[..., 1]}


def expected_interval(numbers, *, share):
    """Return the interval of `share(rows)`, by leaving out each group of rows that has tries."""
    groups = [rows for rows in numbers.values() if sum(row[1] for row in rows)]
    if len(groups) < 2:
        return None
    whole = share([row for rows in groups for row in rows])
    left = [share([row for rows in groups if rows is not one for row in rows]) for one in groups]
    error = np.sqrt((len(groups) - 1) ** 2 / len(groups) * np.var(left, ddof=1))
    return whole, error * stats.t.ppf(0.975, len(groups) - 1), len(groups)


@pytest.mark.parametrize("seed", range(12))
def test_intervals_are_over_scored_groups(seed):
    rng = np.random.default_rng(seed)
    names = [f"{rng.integers(0, 1 + seed % 6)}/{index}" for index in range(rng.integers(1, 14))]
    empty = str(rng.integers(0, 3)) if seed % 2 else ""  # a group without a scored file
    tries = [0 if name[0] == empty else int(rng.integers(1, 30)) for name in names]
    hits = [[int(rng.integers(0, count + 1)) for count in tries] for _ in range(2)]
    groups = {name: name[0] for name in names}
    scored = []
    by_group = {}
    for side in hits:
        listing = Cases([])
        for name, hit, count in zip(names, side, tries, strict=True):
            listing.cases.append(ScoringCase(name, name, ((Path(f"{hit}-{count}"), None),)))
        scored.append(score_cases(Pooled(), listing, where="P", groups=groups))
    for name, first, second, count in zip(names, *hits, tries, strict=True):
        by_group.setdefault(name[0], []).append((first, count, second - first))
    result = summary(Pooled(), scored[0])
    gap = difference(Pooled(), *scored)["share"]
    one, two = (
        expected_interval(
            by_group, share=lambda rows, at=at: sum(row[at] for row in rows) / sum(row[1] for row in rows)
        )
        for at in (0, 2)
    )
    if one is None:
        assert result["ci95"]["share"] is gap["ci95"] is None and result["n"] == gap["n"] < 2
        return
    value, reach, count = one
    unit = "group" if len({*groups.values()}) < len(names) else "image"
    assert result["n"] == gap["n"] == count and result["unit"] == unit
    if 0 < value < 1:
        odds = special.logit(value) + reach / (value * (1 - value)) * np.array([-1, 1])
        assert result["ci95"]["share"] == pytest.approx(special.expit(odds).tolist())
    assert gap["ci95"] == pytest.approx([two[0] - two[1], two[0] + two[1]])


def test_groups_that_divide_a_unit_are_noted():
    scored = scored_cases("a/1-2", "a/3-4", "b/1-2", groups={"a/1-2": "x", "a/3-4": "y", "b/1-2": "y"})
    (note,) = scored.notes
    assert "data.group" in note and "1 of 2 videos, such as a" in note and summary(Share(), scored)["n"] == 2


def test_sums_over_units_and_rows():
    scored = scored_cases("a/1-2", "a/3-8", "b/4-4")
    result = summary(Share(), scored)
    assert result["scores"] == {"share": 8 / 14, "mean": (0.4 + 1) / 2}
    rows = result["per_video"]
    assert [row["name"] for row in rows] == ["a", "b"] and rows[0]["share"] == 0.4 and rows[1]["tries"] == 4
    assert rows[0]["files"] == 2 and rows[0]["tries"] == 10 and "word" not in rows[0]
    assert (result["n"], result["unit"], result["files"]) == (2, "video", 3)
    assert result["per_class"] == [{"id": 0, "name": "hit", "hits": 8.0}] and result["protocol"] == "share"
    scored.total[:] = 0
    assert summary(Share(), scored)["scores"] == {"share": None, "mean": None}  # undefined


def test_units_left_out_in_parts_are_those_of_one_go(monkeypatch):
    scored = scored_cases(*(f"v{index}/{index + 1}-{30 - index}" for index in range(9)))
    whole = summary(Share(), scored)
    means = stats.ttest_1samp([row["mean"] for row in whole["per_video"]], 0).confidence_interval()
    assert whole["ci95"]["mean"] == pytest.approx([means.low, means.high], abs=1e-12)
    sizes = []
    scores = Share.scores
    monkeypatch.setattr(intervals, "_AT_ONCE", 10)
    monkeypatch.setattr(Share, "scores", lambda self, sums: (sizes.append(sums.shape), scores(self, sums))[1])
    assert summary(Share(), scored)["ci95"] == whole["ci95"]
    assert sizes.count((2, 4)) == 4 and (1, 4) in sizes and sizes.count((9, 4)) == 1  # the rows by themselves


def test_interval_of_a_share_stays_within_0_and_1():
    shares = [Estimate(value, error, 1, share=True) for value in (1e-9, 0.02, 0.5, 1 - 1e-9) for error in (1e-9, 0.3)]
    for each in shares:
        low, high = each.ci95
        assert 0 <= low <= each.value <= high <= 1
    assert Estimate(0.0, 0.0, 1, share=True).ci95 == [0.0, 0.0] and Estimate(1.0, 0.0, 1, share=True).ci95 == [1.0, 1.0]
    assert Estimate(0.02, 0.3, 1).ci95[0] < 0


def test_interval_is_clipped_for_scores_but_not_for_differences(monkeypatch):
    sums = np.array([[9, 10, 0.9, 1], [1, 10, 0.1, 1]])
    free = jackknife(Share(), sums)["mean"]
    monkeypatch.setattr(Share, "highest", {"mean": 1.0})
    found = jackknife(Share(), sums)["mean"]
    assert found.ci95 == [free.ci95[0], 1.0] and free.ci95[0] < -1 and free.ci95[1] > 1
    assert found.p == free.p == pytest.approx(1 - 2 * np.arctan(0.5 / 0.4) / np.pi)
    first = np.array([[1, 2, -0.5, 1], [1, 2, -0.7, 1]])
    second = np.array([[1, 2, 0.9, 1], [1, 2, 0.8, 1]])
    apart = estimate_difference(*([score_units(Share(), sums)["mean"]] for sums in (first, second)))
    assert apart.value == pytest.approx(1.45) and apart.ci95[0] < 1.45 < apart.ci95[1]
    assert VideoClustering.highest == {key: 1.0 for key in VideoClustering.keys if "ARI" in key}


def test_one_unit_has_no_interval_and_units_alike_a_point():
    assert summary(Share(), scored_cases("a/1-2"))["ci95"] == {"share": None, "mean": None}
    found = jackknife(Share(), np.array([[0.3, 0.7, 1, 1], [0.0, 0.0, 1, 1], [0.0, 0.0, 0, 1]]))
    assert found["share"].value == pytest.approx(3 / 7) and found["share"].ci95 is found["share"].p is None
    assert found["mean"].ci95 is not None
    alike = jackknife(Share(), np.tile([1.0, 2, 0.5, 1], (7, 1)))["share"]
    assert alike.ci95 == [0.5, 0.5] and alike.p == 0
    alike = score_units(Share(), np.tile([1.0, 2, 0.5, 1], (7, 1)))["share"]
    assert estimate_difference([alike], [alike]).p == 1


def test_score_is_not_divided_without_its_only_unit():
    class Plain(Share):
        def scores(self, sums):
            return {"share": sums[..., 0] / sums[..., 1], "mean": sums[..., 2] / sums[..., 3]}  # 0 / 0 warns

    found = score_units(Plain(), np.array([[1.0, 2.0, 0.5, 1.0]]))["share"]
    assert (found.value, found.estimate().ci95) == (0.5, None)


@pytest.mark.parametrize("runs", [(1, 3), (3, 1), (1, 5), (2, 3)])
def test_equal_scores_do_not_differ_for_any_number_of_runs(runs):
    """A mean of three equal numbers may be another one in the last place, and so surely another than one of two."""
    for sums in np.random.default_rng(0).integers(1, 20, (40, 4, 4)).astype(float):
        for score in score_units(Share(), sums).values():
            found = estimate_difference(*([score] * count for count in runs))
            assert (found.value, found.error, found.p) == (0, 0, 1)


def test_the_paired_difference_leaves_the_same_units_out_of_both():
    better = [f"v{index}/a={index + 5}-40" for index in range(20)]
    first = scored_cases(*(f"v{index}/a={index + 1}-40" for index in range(20)))
    second = scored_cases(*better)
    row = difference(Share(), first, second)["share"]
    assert row["value"] == pytest.approx(0.1) and row["ci95"] == pytest.approx([0.1, 0.1]) and row["n"] == 20
    alone = summary(Share(), first)["ci95"]["share"]
    assert alone[1] - alone[0] > 0.05  # while each by itself varies much
    row = difference(Share(), first, scored_cases(*better[::-1][:5], "new/a=1-1"))["mean"]
    assert row["n"] == 5 and row["value"] == pytest.approx(0.1) and row["left_out"] == 16


def test_holms_values_are_those_of_closed_testing():
    draw = np.random.default_rng(5)
    for count in (1, 2, 5):
        for _ in range(20):
            chances = (draw.random(count) ** 3).round(2).tolist()
            sets = [each for size in range(1, count + 1) for each in combinations(range(count), size)]
            least = {each: min(1.0, len(each) * min(chances[place] for place in each)) for each in sets}
            expected = [max(value for each, value in least.items() if place in each) for place in range(count)]
            assert holm(chances) == pytest.approx(expected)
    assert holm([0.04, None, 0.02]) == pytest.approx([0.04, None, 0.04]) and holm([]) == []


def test_the_paired_difference_is_of_the_cases_that_both_have():
    first = ["a/hard=1-10", "a/easy=9-10", "b/hard=2-10", "b/easy=8-10", "c/easy=5-10"]
    second = ["a/easy=9-10", "b/hard=2-10", "b/easy=bad-10", "c/hard=1-10"]
    scored = [scored_cases(*each, on_error="skip") for each in (first, second)]
    found = difference(Share(), *scored)
    assert found["share"] == found["mean"] == {"value": 0, "ci95": [0, 0], "p": 1, "n": 2, "left_out": 4}
    assert scored[0].total[0] / scored[0].total[1] != scored[1].total[0] / scored[1].total[1]


@pytest.mark.slow
def test_paired_difference_takes_linear_time():
    scored = scored_cases(*(f"v{index}/a=1-2" for index in range(10_000)), workers=1)
    start = time.process_time()
    assert difference(Share(), scored, scored)["share"]["n"] == 10_000
    assert time.process_time() - start < 3  # looking up each in the others took several times as long


@pytest.mark.parametrize(
    ("frames", "workers", "processes"),
    [(1, None, 1), (60, None, 8), (20, 3, 3), (1, 5, 5), (6, None, 1), (10, None, 2)],
)
def test_process_count_follows_the_frames_or_the_argument(monkeypatch, frames, workers, processes):
    given = []

    def alone(work, items, workers, **_):
        given.append(workers)
        return ((item, work(item)) for item in items)

    monkeypatch.setattr(folders, "in_processes", alone)
    monkeypatch.setattr(folders, "count_cores", lambda: 8)
    found = cases("a/1-2", "b/1-2", "c/1-4", "d/1-2", frames=frames)
    scored = score_cases(Share(), found, where="P", workers=workers)
    assert given == [processes] and summary(Share(), scored)["files"] == 4 * frames


def test_files_that_cannot_be_scored_are_all_named():
    found = cases("a/1-2", "b/bad-1", "c/bad-2", "d/1-1")
    found.problems.append((Path("lost.png"), "it is missing"))
    said = "lost.png: it is missing", "b/bad-1: it is bad", "data.on_error=skip"
    message = assert_refused(lambda: score_cases(Share(), found, where="P"), *said, error=Unscorable)
    assert message.startswith("3 files of P cannot be scored")
    scored = score_cases(Share(), found, where="P", on_error="skip")
    assert scored.units == ["a", "d"]
    assert [row["file"] for row in summary(Share(), scored)["problems"]] == ["lost.png", "b/bad-1", "c/bad-2"]
    nothing = "Nothing is left to score in P: 1 problem, such as a/bad-1: it is bad"
    assert_refused(lambda: scored_cases("a/bad-1", on_error="skip"), nothing)
    many = Unscorable([(Path(f"{number}.png"), "bad") for number in range(30)], "P")
    assert "2.png: bad\n- and 27 more\nCorrect them" in str(many)
    assert len(many.problems) == 30


def test_a_bad_file_of_another_process_keeps_path_and_reason():
    bad = BadFile(Path("a.png"), "it is bad")
    copy = pickle.loads(pickle.dumps(bad))
    assert (copy.path, copy.reason, str(copy)) == (bad.path, bad.reason, str(bad))


def test_killed_scoring_process_names_the_remedy(monkeypatch):
    def kill(*_, remedy, **__):
        raise UserError(f"A process was killed. {remedy}")

    monkeypatch.setattr(folders, "in_processes", kill)
    assert_refused(lambda: scored_cases("a/1-2", workers=2), "was killed. ", "Lower mode.workers")
    other = partial(scored_cases, "a/1-2", workers=2, remedy="Do another thing.")
    assert "mode.workers" not in assert_refused(other, "was killed. Do another thing")


def test_tables_show_scores_and_intervals():
    scored = scored_cases("a/1-2", "b/1-4")
    text = scores_table(summary(Share(), scored))
    assert "share" in text and "33.33" in text and re.search(r"-121\.33 \.\. 196\.33 +2$", text, flags=re.M)
    assert re.search(r"33\.33 +0\.\d\d \.\. 99\.\d\d +2$", text, flags=re.M)
    text = difference_table(difference(Share(), scored, scored), "video", "video")
    assert re.search(r"\+0\.00 \.\. \+0\.00 +2$", text, flags=re.M)
    assert "needs two" not in scores_table({**summary(Share(), scored_cases("a/1-2")), "n": 2})


def test_only_shares_are_in_percent():
    rows = [{"id": 1, "name": "a", "iou": 0.5, "images": 3}, {"id": 2, "name": "b", "iou": None, "images": 0}]
    text = scores_table({**summary(Share(), scored_cases("a/1-2", "b/1-2")), "per_class": rows})
    first, _, row, none = text.splitlines()[:4]
    assert first.split() == ["id", "name", "iou", "%", "images"]
    assert row.split() == ["1", "a", "50.00", "3"] and none.split() == ["2", "b", "-", "0"]
