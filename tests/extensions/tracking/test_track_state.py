import pytest
import torch
from mistakes import assert_refused
from safetensors.torch import save_file

from dinoseg.experiment.settings import check_same_settings
from dinoseg.extensions.tracking.video.state import STATE, read_track_state
from dinoseg.utils.errors import UserError


def test_settings_are_compared_by_full_name_as_json(tmp_path):
    check_same_settings(tmp_path, {"size": [3, 4], "by_id": {"1": 2}}, {"size": (3, 4), "by_id": {1: 2}})
    then = {"first": {"view": {"size": 3}}, "second": {"view": {"size": 4}}}
    with pytest.raises(UserError, match=r"first\.view\.size was 3 and is 5\. Use"):
        check_same_settings(tmp_path, then, {**then, "first": {"view": {"size": 5}}})


def test_folders_without_a_usable_state_are_refused(tmp_path):
    assert_refused(lambda: read_track_state(tmp_path / "nowhere"), "not an unfinished run of mode=track")
    path = tmp_path / STATE
    path.write_bytes(b"torn")
    assert_refused(lambda: read_track_state(tmp_path), "is not readable ", "Leave mode.restart out")
    for header in (None, {"track": "[]"}, {"track": "{}"}, {"track": '{"format": 1, "progress": {"x": 1}}'}):
        save_file({"a": torch.zeros(1)}, path, header)
        with pytest.raises(UserError, match="is not readable"):
            read_track_state(tmp_path)
    save_file({"a": torch.zeros(1)}, path, {"track": '{"format": 2}'})
    assert_refused(lambda: read_track_state(tmp_path), "was written by a newer dinoseg")
    (tmp_path / "track.json").write_text("{}")
    with pytest.raises(UserError, match="that run is finished; its masks are in .*masks. To track again"):
        read_track_state(tmp_path)
