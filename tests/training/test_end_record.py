"""What a sweep's folder is called where one run is needed: its best run, by the records of its jobs."""

import pytest

from dinoseg.training.end_record import Ranking, describe_sweep, write_end


@pytest.mark.parametrize(
    ("rankings", "text"),
    [
        ([("miou", 0.1), ("miou", 0.3), ("miou", 0.2)], "3 runs, the best by val/miou is {}/1: give init={}/1"),
        ([("loss", 0.3, True), ("loss", 0.2, True), None], "3 runs, the best by val/loss is {}/1: give init={}/1"),
        (
            [("miou", 0.1), ("AP", 0.3)],
            "2 runs of different folds or scores, so none is the best: give one, init={}/JOB",
        ),
        (
            [("miou", 0.1, False, 0), ("miou", 0.3, False, 1)],
            "2 runs of different folds or scores, so none is the best",
        ),
        ([None, None], "2 runs without a final evaluation, so none is the best: give one, init={}/JOB"),
    ],
)
def test_sweep_names_its_best_run_if_scores_are_comparable(tmp_path, rankings, text):
    for number, ranking in enumerate(rankings):
        run = tmp_path / str(number)
        run.mkdir()
        if ranking is not None:
            write_end(run, 4, {}, Ranking(*ranking[:2], *(ranking[2:] or (False,))))
    assert f"is a sweep of {text.replace('{}', str(tmp_path))}" in describe_sweep(tmp_path, key="init")
