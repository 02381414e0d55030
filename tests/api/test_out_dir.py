"""A used out_dir is refused, unless its run may stay beside the new one."""

import shutil
from pathlib import Path

import pytest
from command_line import SMALL, call, write_data

import dinoseg
from dinoseg.utils.errors import UserError

QUICK = {"mode": {"report": False, "metrics_only": True}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_data(folder / "data")
    done = call(folder, "mode=train", *SMALL, "mode.report=false", "mode.metrics_only=true", "hydra.run.dir=trained")
    assert done.status == 0, done.err
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """Enter a copy of the folder, with a run in `used`."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree("trained", "used")
    return tmp_path


def train(**options):
    return dinoseg.train(None, *SMALL, **QUICK, **options)


CALLS = {
    "train": train,
    "evaluate": lambda **options: dinoseg.evaluate("trained", **QUICK, **options),
    "predict": lambda **options: dinoseg.predict("trained", "data/val/images", **options),
    "track": lambda **options: dinoseg.track("trained", "data/val/images", **options),
    "score": lambda **options: dinoseg.score(
        "data/val/masks", "data/val/masks", **{"protocol.num_classes": 2}, **options
    ),
    "compare": lambda **options: dinoseg.compare(["trained", "trained"], **options),
    "export": lambda **options: dinoseg.Run("trained").export(**options),
}


def contents():
    return sorted((str(path), path.stat().st_mtime_ns) for path in Path().rglob("*"))


@pytest.mark.parametrize("name", CALLS)
def test_used_folder_is_refused_and_unchanged(here, name):
    before = contents()
    with pytest.raises(UserError, match=r"out_dir=.*used holds files.*exist_ok=True"):
        CALLS[name](out_dir="used")
    assert contents() == before


@pytest.mark.parametrize(
    "given", [["hydra.run.dir=used"], {"hydra.run.dir": "used"}, {"hydra": {"run": {"dir": "used"}}}]
)
def test_used_folder_of_an_override_is_refused(here, given):
    words, options = (given, {}) if isinstance(given, list) else ([], given)
    with pytest.raises(UserError, match="used holds files"):
        dinoseg.evaluate("trained", *words, **QUICK, **options)
    assert not Path("used_2").exists()
    assert dinoseg.evaluate("trained", *words, **QUICK, **options, exist_ok=True).folder.name == "used_2"


def test_existing_out_dir_is_not_overwritten(here):
    scores = dinoseg.evaluate("trained", **QUICK, out_dir="used", exist_ok=True)
    assert scores.folder == here / "used_2" and (here / "used/checkpoints").is_dir()


def test_predictions_with_exist_ok_are_written_next_to_the_first(here):
    runs = ("trained", "trained", "used")
    found = [dinoseg.predict(name, "data/val/images", out_dir="predicted", exist_ok=True) for name in runs]
    assert [each.folder.name for each in found] == ["predicted", "predicted_2", "predicted_3"]


def test_runs_resume_in_their_own_folder(here):
    run = dinoseg.Run("used").resume(trainer={"steps": 3})
    assert run.folder == here / "used" and run.step == 3
    again = train(resume="used", out_dir="used", trainer={"steps": 4})
    assert again.folder == here / "used" and again.step == 4


def test_a_prediction_resumes_in_its_folder(here):
    for _ in range(2):
        found = dinoseg.predict("trained", "data/val/images", out_dir="predicted")
        assert found.folder == here / "predicted"


def test_files_that_no_run_has_written_are_not_mixed_with_a_run(here):
    (here / "mine").mkdir()
    (here / "mine/notes.txt").write_text("of the user")
    before = contents()
    with pytest.raises(UserError, match="mine holds files already"):
        dinoseg.evaluate("trained", **QUICK, out_dir="mine")
    assert contents() == before
    assert dinoseg.evaluate("trained", **QUICK, out_dir="mine", exist_ok=True).folder == here / "mine"


@pytest.mark.parametrize("folder", ["~nosuchuser/x", "a\ud800"])
def test_a_folder_that_cannot_exist_is_an_error(here, folder):
    with pytest.raises(UserError, match="nosuchuser|ud800"):
        dinoseg.evaluate("trained", **QUICK, out_dir=folder)
