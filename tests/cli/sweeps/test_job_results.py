"""What jobs of a sweep tell, and what is left where a sweep ends before it has any."""

import pytest

from dinoseg.cli.sweeps import job_results
from dinoseg.cli.sweeps.job_results import JobResults
from dinoseg.utils import locks
from dinoseg.utils.errors import UserError

ROW = {"words": {}, "job": 0, "process": 1, "note": "", "returned": {"miou": 0.5}}


def test_a_sweep_that_came_to_no_job_leaves_no_folder_and_nothing_locked(tmp_path):
    assert JobResults(tmp_path).take(takes_over=False)
    job_results._end()
    assert not [*tmp_path.iterdir()] and not job_results._held


@pytest.mark.parametrize("takes_over", [False, True])
def test_a_link_in_the_place_of_its_folder_is_refused_and_nothing_behind_it_removed(tmp_path, takes_over):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/0.json").write_text("of another")
    (tmp_path / ".jobs").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.jobs is a symbolic link"):
        JobResults(tmp_path).take(takes_over=takes_over)
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["0.json"] and not job_results._held


def test_a_new_sweep_removes_what_jobs_before_have_told_and_nothing_else(tmp_path):
    folder = tmp_path / ".jobs"
    folder.mkdir()
    for name in ("0.json", "0.own", "12.given_up", "notes.txt", "a0.json", "0.json.bak"):
        (folder / name).touch()
    (folder / "sub").mkdir()
    assert JobResults(tmp_path).take(takes_over=False)
    assert sorted(path.name for path in folder.iterdir()) == ["0.json.bak", "a0.json", "notes.txt", "sub", "sweep.own"]
    JobResults(tmp_path).leave(keep=True)


def test_what_jobs_have_told_outlives_a_sweep_that_ends_early(tmp_path):
    assert JobResults(tmp_path).take(takes_over=False)
    JobResults(tmp_path).store(0, ROW)
    JobResults(tmp_path).begin(1)
    job_results._end()
    assert JobResults(tmp_path).rows() == [ROW]
    held = locks.acquire(tmp_path / ".jobs/1.own")
    assert held is not None and not job_results._held
    locks.release(held)


def test_a_number_that_no_float_holds_is_told_as_damage(tmp_path, capsys):
    JobResults(tmp_path).store(0, ROW | {"returned": {"miou": 10**400}})
    assert JobResults(tmp_path).returned(0) is None and "is damaged" in capsys.readouterr().err
