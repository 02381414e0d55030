"""A used out_dir is refused, unless its run may be replaced or stay beside the new one."""

import fcntl
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
    "score": lambda **options: dinoseg.score("data/val/masks", "data/val/masks", num_classes=2, **options),
    "compare": lambda **options: dinoseg.compare(["trained", "trained"], **options),
    "export": lambda **options: dinoseg.Run("trained").export(**options),
}


def contents():
    return sorted((str(path), path.stat().st_mtime_ns) for path in Path().rglob("*"))


@pytest.mark.parametrize("name", CALLS)
def test_a_used_folder_is_refused_and_unchanged(here, name):
    before = contents()
    with pytest.raises(UserError, match=r"out_dir=.*used.*overwrite=True.*exist_ok=True"):
        CALLS[name](out_dir="used")
    assert contents() == before


def test_a_used_folder_is_replaced(here):
    (here / "used/notes.txt").write_text("of the old run")
    scores = dinoseg.evaluate("trained", **QUICK, out_dir="used", overwrite=True)
    assert scores.folder == here / "used" and (scores.folder / "scores.json").is_file()
    assert not (here / "used/checkpoints").exists() and not (here / "used/notes.txt").exists()
    assert not (here / "used_2").exists()
    exported = dinoseg.Run("trained").export(out_dir="new", overwrite=True)
    assert exported.folder == here / "new"


def test_a_used_folder_stays_beside_the_new_one(here):
    scores = dinoseg.evaluate("trained", **QUICK, out_dir="used", exist_ok=True)
    assert scores.folder == here / "used_2" and (here / "used/checkpoints").is_dir()


def test_a_folder_that_the_call_reads_is_not_replaced(here):
    for call_ in (
        lambda: dinoseg.evaluate("used", **QUICK, out_dir="used", overwrite=True),
        lambda: dinoseg.evaluate("used/checkpoints/best.safetensors", **QUICK, out_dir="used", overwrite=True),
        lambda: dinoseg.compare(["trained", "used"], out_dir="used", overwrite=True),
    ):
        with pytest.raises(UserError, match="used.*is read"):
            call_()
    assert (here / "used/checkpoints/best.safetensors").is_file()


def test_the_current_folder_is_not_replaced(here, monkeypatch):
    absolute = {"backbone": "rgb", "data.root": here / "data", "cache_dir": here / "cache"}
    (here / "used/here").mkdir()
    monkeypatch.chdir("used/here")
    with pytest.raises(UserError, match="used.*is read"):
        dinoseg.evaluate(here / "trained", **QUICK, **absolute, out_dir=here / "used", overwrite=True)
    assert (here / "used/here").is_dir()


def test_a_folder_in_use_is_not_replaced(here):
    with open("used/run.log", "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UserError, match="writing to .*used.*another out_dir"):
            dinoseg.evaluate("trained", **QUICK, out_dir="used", overwrite=True)
    assert (here / "used/checkpoints/best.safetensors").is_file()


def test_a_mistake_does_not_delete_the_old_run(here):
    with pytest.raises(UserError, match="nonsense"):
        train(out_dir="used", overwrite=True, nonsense=1)
    with pytest.raises(UserError, match="exclude"):
        train(out_dir="used", overwrite=True, exist_ok=True)
    assert (here / "used/checkpoints/best.safetensors").is_file()


def test_runs_resume_in_their_own_folder(here):
    run = dinoseg.Run("used").resume(trainer={"steps": 3})
    assert run.folder == here / "used" and run.step == 3
    again = train(resume="used", out_dir="used", trainer={"steps": 4})
    assert again.folder == here / "used" and again.step == 4


def test_a_prediction_resumes_in_its_folder(here):
    for _ in range(2):
        found = dinoseg.predict("trained", "data/val/images", out_dir="predicted")
        assert found.folder == here / "predicted"
    (here / "predicted/notes.txt").write_text("of the old run")
    assert dinoseg.predict("trained", "data/val/images", out_dir="predicted", overwrite=True).folder == found.folder
    assert not (here / "predicted/notes.txt").exists()


def test_folders_of_others_are_not_replaced(here, monkeypatch):
    home = here / "home"
    shutil.copytree("trained", home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    (here / "foreign").mkdir()
    (here / "foreign/run.log").write_text("of another program")
    shutil.copytree("trained", "outer")
    shutil.copytree("trained", "outer/inner")
    shutil.copytree("trained", "configs")
    before = contents()
    cases = {
        "~": (None, "home"),
        "foreign": (None, "not written by dinoseg"),
        "outer": (None, "inner"),
        "configs": ("configs", "is read"),
    }
    for folder, (config_dir, reason) in cases.items():
        with pytest.raises(UserError, match=f"overwrite=True.*{reason}"):
            dinoseg.evaluate("trained", **QUICK, out_dir=folder, overwrite=True, config_dir=config_dir)
    assert contents() == before


def test_a_run_behind_a_link_is_replaced(here):
    (here / "link").symlink_to("used")
    scores = dinoseg.evaluate("trained", **QUICK, out_dir="link", overwrite=True)
    assert (scores.folder / "scores.json").is_file() and not (here / "used/checkpoints").exists()
    assert (here / "link").is_symlink()


def test_a_failed_call_puts_the_old_run_back(here):
    def read():
        return {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}

    before = read()
    with pytest.raises(UserError, match="missing"):
        dinoseg.score("data/val/masks", "missing", out_dir="used", overwrite=True)
    assert read() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_no_run_has_written_are_not_mixed_with_a_run(here, overwrite):
    (here / "mine").mkdir()
    (here / "mine/notes.txt").write_text("of the user")
    before = contents()
    with pytest.raises(UserError, match="mine holds files that no run has written"):
        dinoseg.evaluate("trained", **QUICK, out_dir="mine", overwrite=overwrite)
    assert contents() == before
    assert dinoseg.evaluate("trained", **QUICK, out_dir="mine", exist_ok=True).folder == here / "mine"


@pytest.mark.parametrize("folder", ["~nosuchuser/x", "a\ud800"])
def test_a_folder_that_cannot_exist_is_an_error(here, folder):
    with pytest.raises(UserError, match="nosuchuser|ud800"):
        dinoseg.evaluate("trained", **QUICK, out_dir=folder)
