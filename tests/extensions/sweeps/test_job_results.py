"""Stored results of a sweep's jobs, and the folder of a sweep that ends before it has any."""

import pytest

from dinoseg.extensions.sweeps import job_results
from dinoseg.extensions.sweeps.job_results import JobResults
from dinoseg.utils import locks
from dinoseg.utils.errors import UserError

ROW = {"words": {}, "job": 0, "process": 1, "note": "", "returned": {"miou": 0.5}, "further": []}


def test_sweep_without_jobs_leaves_no_folder(tmp_path):
    assert JobResults(tmp_path).claim(keep=False)
    job_results._release_all()
    assert not [*tmp_path.iterdir()]
    JobResults(tmp_path).release(keep=False)


def test_released_folder_can_be_locked_again(tmp_path):
    for _ in range(2):
        assert JobResults(tmp_path).claim(keep=False)
        assert locks.acquire(tmp_path / ".jobs/sweep.own") is None
        JobResults(tmp_path).release(keep=True)


@pytest.mark.parametrize("keep", [False, True])
def test_symbolic_link_as_job_folder_is_refused(tmp_path, keep):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/0.json").write_text("of another")
    (tmp_path / ".jobs").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.jobs is a symbolic link"):
        JobResults(tmp_path).claim(keep=keep)
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["0.json"]


def test_a_new_sweep_removes_earlier_results_and_nothing_else(tmp_path):
    folder = tmp_path / ".jobs"
    folder.mkdir()
    for name in ("0.json", "notes.txt", "a0.json", "0.json.bak"):
        (folder / name).touch()
    (folder / "sub").mkdir()
    assert JobResults(tmp_path).claim(keep=False)
    assert sorted(path.name for path in folder.iterdir()) == ["0.json.bak", "a0.json", "notes.txt", "sub", "sweep.own"]
    JobResults(tmp_path).release(keep=True)


def test_results_of_an_interrupted_sweep_are_stored(tmp_path):
    assert JobResults(tmp_path).claim(keep=False)
    JobResults(tmp_path).store(0, ROW)
    job_results._release_all()
    assert JobResults(tmp_path).rows() == [ROW]
    JobResults(tmp_path).release(keep=True)
    assert JobResults(tmp_path).rows() == [ROW]


def test_a_number_that_no_float_holds_is_reported_as_damage(tmp_path, capsys):
    JobResults(tmp_path).store(0, ROW | {"returned": {"miou": 10**400}})
    assert JobResults(tmp_path).rows() == [] and "is damaged" in capsys.readouterr().err
