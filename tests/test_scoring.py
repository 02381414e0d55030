"""From cases to scores: sums over units, intervals, paired differences, and files that cannot be scored."""

import os
from pathlib import Path

import numpy as np
import pytest

from dinoseg import scoring
from dinoseg.errors import UserError
from dinoseg.metrics.protocols.contract import BadFile, Case, Found, Measured, pooled
from dinoseg.report.scores import difference_table, scores_table


class Share:
    """Hits among tries, written in a case's name as `unit/hits-tries`; the mean over units is a second score."""

    name, unit, keys, rules = "share", "video", ("share", "mean"), {"version": "1"}

    def measure(self, case):
        if "bad" in case.name:
            raise BadFile(Path(case.name), "it is bad")
        hits, tries = map(int, case.name.split("/")[1].split("-"))
        return Measured(np.array([hits, tries]), {"tries": tries, "word": "x"})

    def join(self, measured):
        hits, tries = pooled(measured)
        return np.array([hits, tries, hits / tries, 1.0])

    def scores(self, sums):
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"share": sums[..., 0] / sums[..., 1], "mean": sums[..., 2] / sums[..., 3]}

    def per_class(self, sums):
        return [{"id": 0, "name": "hit", "hits": sums[0]}]


def cases(*names):
    return Found([Case(name, name.split("/")[0], ()) for name in names])


def test_sums_over_units_and_rows():
    scored = scoring.score(Share(), cases("a/1-2", "a/3-8", "b/4-4"), where="P")
    result = scoring.result(Share(), scored)
    assert result["scores"] == {"share": 8 / 14, "mean": (0.4 + 1) / 2}
    rows = result["per_video"]
    assert [row["name"] for row in rows] == ["a", "b"] and rows[0]["share"] == 0.4 and rows[1]["tries"] == 4
    assert rows[0]["files"] == 2 and rows[0]["tries"] == 10 and "word" not in rows[0]
    assert (result["n"], result["unit"], result["files"]) == (2, "video", 3)
    assert result["per_class"] == [{"id": 0, "name": "hit", "hits": 8.0}] and result["protocol"] == "share"


def test_intervals_are_the_percentiles_of_resampled_units():
    rng = np.random.default_rng(1)
    found = cases(*(f"v{index}/{rng.integers(1, 9)}-{rng.integers(9, 20)}" for index in range(12)))
    scored = scoring.score(Share(), found, where="P")
    result = scoring.result(Share(), scored, resamples=2000, seed=3)
    drawn = [
        scored.sums[rng.integers(0, 12, 12)].sum(axis=0) for _ in range(4000)
    ]  # another generator, drawn one by one
    for key, values in (("share", [s[0] / s[1] for s in drawn]), ("mean", [s[2] / s[3] for s in drawn])):
        low, high = result["ci95"][key]
        expected = np.percentile(values, (2.5, 97.5))
        assert low < result["scores"][key] < high
        np.testing.assert_allclose([low, high], expected, atol=0.15 * (expected[1] - expected[0]))
    assert scoring.result(Share(), scored, resamples=2000, seed=3)["ci95"] == result["ci95"]
    assert scoring.result(Share(), scored, resamples=2000, seed=4)["ci95"] != result["ci95"]


def test_one_unit_or_no_draws_have_no_interval():
    scored = scoring.score(Share(), cases("a/1-2"), where="P")
    assert scoring.result(Share(), scored)["ci95"] == {"share": None, "mean": None}
    scored = scoring.score(Share(), cases("a/1-2", "b/1-2"), where="P")
    assert scoring.result(Share(), scored, resamples=0)["ci95"]["share"] is None


def test_the_paired_difference_draws_the_same_units_for_both():
    names = [f"v{index}/{index + 1}-40" for index in range(20)]
    better = [f"v{index}/{index + 5}-40" for index in range(20)]
    first, second = (scoring.score(Share(), cases(*each), where="P") for each in (names, better))
    row = scoring.difference(Share(), first, second)["share"]
    assert row["value"] == pytest.approx(0.1) and row["ci95"] == pytest.approx([0.1, 0.1]) and row["n"] == 20
    alone = scoring.result(Share(), first)["ci95"]["share"]
    assert alone[1] - alone[0] > 0.05  # while each by itself varies much
    fewer = scoring.score(Share(), cases(*better[::-1][:5], "new/1-1"), where="P")
    row = scoring.difference(Share(), first, fewer)["mean"]
    assert row["n"] == 5 and row["value"] == pytest.approx(0.1)


def test_undefined_scores_are_null():
    scored = scoring.score(Share(), cases("a/0-1", "b/1-1"), where="P")
    scored.total[:] = 0
    assert scoring.result(Share(), scored)["scores"] == {"share": None, "mean": None}


def test_files_that_cannot_be_scored_are_all_named():
    found = cases("a/1-2", "b/bad-1", "c/bad-2", "d/1-1")
    found.problems.append((Path("lost.png"), "it is missing"))
    with pytest.raises(scoring.Unscorable, match="3 file.*of P cannot be scored") as caught:
        scoring.score(Share(), found, where="P")
    message = str(caught.value)
    assert all(word in message for word in ("lost.png: it is missing", "b/bad-1: it is bad", "data.on_error=skip"))
    scored = scoring.score(Share(), found, where="P", on_error="skip")
    assert scored.units == ["a", "d"]
    assert [row["file"] for row in scoring.result(Share(), scored)["problems"]] == ["lost.png", "b/bad-1", "c/bad-2"]
    many = scoring.Unscorable([(Path(f"{number}.png"), "bad") for number in range(30)], "P")
    assert (
        "19.png" in str(many) and "20.png" not in str(many) and "and 10 more" in str(many) and len(many.problems) == 30
    )


def test_processes_give_what_one_gives():
    names = [f"v{index % 5}/{'bad' if index % 7 == 3 else index}-{index + 9}" for index in range(30)]
    alone, many = (
        scoring.result(Share(), scoring.score(Share(), cases(*names), where="P", workers=workers, on_error="skip"))
        for workers in (1, 3)
    )
    assert many == alone and len(many["problems"]) == 4 and many["files"] == 26


class Deadly(Share):
    """Measuring kills the process."""

    def measure(self, case):
        os._exit(9)


def test_a_killed_process_is_told():
    with pytest.raises(UserError, match=r"was killed.*Set mode\.workers below 2 and run again"):
        scoring.score(Deadly(), cases(*["a/1-2"] * 30), where="P", workers=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "data.on_error=ignore is unknown. Choose one of stop, skip"),
        ({"workers": 0}, "mode.workers=0: give the number of processes"),
        ({"on_error": "skip"}, "Nothing is left to score in P: 1 problems"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        scoring.score(Share(), cases("a/bad-1"), where="P", **options)


def test_tables():
    scored = scoring.score(Share(), cases("a/1-2", "b/1-4"), where="P")
    text = scores_table(scoring.result(Share(), scored))
    assert "share" in text and "33.33" in text and "25.00 .. 50.00" in text and "over 2 videos" in text
    text = difference_table(scoring.difference(Share(), scored, scored), "video")
    assert "+0.00" in text and "over 2 shared videos" in text
