"""What Ctrl-C says in each mode."""

import pytest
from command_line import call

from dinoseg import launch


@pytest.mark.parametrize("mode", ["train", "track", "eval", "predict", "score"])
def test_ctrl_c_says_what_fits_the_mode(tmp_path, monkeypatch, mode):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "launch", stop)
    done = call(tmp_path, f"mode={mode}", "data.root=data")
    assert done.status == 130
    assert ("resume=auto" in done.err) == (mode == "train")
    assert done.err == "\ninterrupted\n" or mode == "train"
