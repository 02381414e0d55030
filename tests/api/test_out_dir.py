"""A used out_dir is refused, unless its run may stay beside the new one."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from command_line import SMALL, link_all
from mistakes import assert_refused

import dinoseg

pytestmark = pytest.mark.slow
QUICK = {"mode": {"report": False, "metrics_only": True}}


@pytest.fixture
def here(trained_once, tmp_path, monkeypatch):
    """Enter a folder with a run, `segmenter`, its data, and a copy of the run in `used`."""
    monkeypatch.chdir(link_all(trained_once, tmp_path))
    shutil.copytree("segmenter", "used")
    return tmp_path


train = partial(dinoseg.train, None, *SMALL, **QUICK)
evaluate = partial(dinoseg.evaluate, "segmenter", **QUICK)
predict = partial(dinoseg.predict, "segmenter", "data/val/images")
MASKS = "data/val/masks"
score = partial(dinoseg.score, MASKS, MASKS, **{"protocol.num_classes": 2})
CALLS = {
    "train": partial(train, out_dir="used"),
    "evaluate": partial(evaluate, out_dir="used"),
    "evaluate, by a word": partial(evaluate, "hydra.run.dir=used"),
    "evaluate, by a key": partial(evaluate, **{"hydra.run.dir": "used"}),
    "evaluate, by nested keys": partial(evaluate, hydra={"run": {"dir": "used"}}),
    "predict": partial(predict, out_dir="used"),
    "track": partial(dinoseg.track, "segmenter", "data/val/images", out_dir="used"),
    "score": partial(score, out_dir="used"),
    "compare": partial(dinoseg.compare, ["segmenter", "segmenter"], out_dir="used"),
    "export": lambda: dinoseg.Run("segmenter").export(out_dir="used"),
}


def contents():
    return sorted((str(path), path.stat().st_mtime_ns) for path in Path().rglob("*"))


@pytest.mark.parametrize("name", CALLS)
def test_used_folder_is_refused_and_unchanged(here, name):
    before = contents()
    assert_refused(CALLS[name], "out_dir=", "used holds files", "exist_ok=True")
    assert contents() == before


def test_existing_out_dir_is_not_overwritten(here):
    assert evaluate(out_dir="used", exist_ok=True).folder == here / "used_2" and Path("used/checkpoints").is_dir()


def test_prediction_resumes_in_its_folder(here):
    assert [predict(out_dir="predicted").folder for _ in range(2)] == 2 * [here / "predicted"]


@pytest.mark.heavy
def test_other_predictions_are_written_next_to_the_first(here):
    predict(out_dir="predicted")
    found = [dinoseg.predict(name, MASKS, out_dir="predicted", exist_ok=True) for name in ("segmenter", "used")]
    assert [each.folder.name for each in found] == ["predicted_2", "predicted_3"]


@pytest.mark.heavy
def test_runs_resume_in_their_own_folder(here):
    run = dinoseg.Run("used").resume(trainer={"steps": 5})
    assert run.folder == here / "used" and run.step == 5
    again = dinoseg.train(None, resume="used", out_dir="used", trainer={"steps": 6}, engine="cpu", **QUICK)
    assert again.folder == here / "used" and again.step == 6


def test_files_that_no_run_has_written_are_not_mixed_with_a_run(here):
    (here / "mine").mkdir()
    (here / "mine/notes.txt").write_text("of the user")
    before = contents()
    assert_refused(partial(score, out_dir="mine"), "mine holds files already")
    assert contents() == before
    assert score(out_dir="mine", exist_ok=True).folder == here / "mine"
