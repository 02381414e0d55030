"""What jobs of a sweep tell, and what is left where a sweep ends before it has any."""

from dinoseg.storage import locks
from dinoseg.sweeps import told
from dinoseg.sweeps.told import Told

ROW = {"words": {}, "job": 0, "process": 1, "note": "", "returned": {"miou": 0.5}}


def test_a_sweep_that_came_to_no_job_leaves_no_folder_and_nothing_locked(tmp_path):
    assert Told(tmp_path).take(takes_over=False)
    told._end()
    assert not [*tmp_path.iterdir()] and not told._held


def test_what_jobs_have_told_outlives_a_sweep_that_ends_early(tmp_path):
    assert Told(tmp_path).take(takes_over=False)
    Told(tmp_path).tell(0, ROW)
    Told(tmp_path).begin(1)
    told._end()
    assert Told(tmp_path).rows() == [ROW]
    held = locks.acquire(tmp_path / ".jobs/1.own")
    assert held is not None and not told._held
    locks.release(held)


def test_a_number_that_no_float_holds_is_told_as_damage(tmp_path, capsys):
    Told(tmp_path).tell(0, ROW | {"returned": {"miou": 10**400}})
    assert Told(tmp_path).returned(0) is None and "is damaged" in capsys.readouterr().err
