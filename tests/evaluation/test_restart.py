"""What an evaluation of videos takes over, where the run folder holds what no run wrote."""

import os

import pytest

from dinoseg.evaluation.restart import DIGESTS, take_over
from dinoseg.utils.errors import UserError


def test_a_note_that_is_no_file_is_not_waited_for(tmp_path):
    (tmp_path / DIGESTS).mkdir()
    os.mkfifo(tmp_path / DIGESTS / "bear.txt")
    with pytest.raises(UserError, match=r"bear\.txt"):
        take_over(tmp_path, tmp_path / "out", {}, "bear", "0")
    assert not take_over(tmp_path, tmp_path / "out", {}, "cow", "0")
