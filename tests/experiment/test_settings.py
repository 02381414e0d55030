import pytest

from dinoseg.experiment.settings import check_same_settings
from dinoseg.utils.errors import UserError


def test_each_changed_setting_is_named(tmp_path):
    before = {"mode": {"skip": 1, "size": [2, 3]}, "stamp": 3}
    check_same_settings(tmp_path, before, {"mode": {"skip": 1, "size": (2, 3)}, "stamp": 3})
    for now, said in (
        ({"mode": {"skip": 2, "size": [2, 3]}, "stamp": 3}, r"differ from that run: mode\.skip was 1 and is 2\. Use"),
        ({"mode": {"skip": 1, "size": None}, "stamp": True}, r"size was \[2,3\] and is null; stamp was 3 and is true"),
        ({"mode": {"skip": 1, "size": [2, 3]}}, "stamp was 3 and is not set"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            check_same_settings(tmp_path, before, now, key="hydra.run.dir")
        assert str(refused.value).endswith("or start over without hydra.run.dir.")
