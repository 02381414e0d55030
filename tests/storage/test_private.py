"""Folders that other users may write to."""

import grp
import os

import pytest
from command_line import call

from dinoseg.errors import UserError
from dinoseg.storage import private
from dinoseg.storage.private import check_private

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@pytest.mark.parametrize(
    ("mode", "says"),
    [(0o1777, "every user of this machine"), (0o757, "every user of this machine"), (0o775, "the group lab")],
)
def test_a_folder_that_others_may_write_to_is_refused(mode, says, tmp_path, monkeypatch):
    monkeypatch.setattr(grp, "getgrgid", lambda number: grp.struct_group(("lab", "", number, [])))
    tmp_path.chmod(mode)
    with pytest.raises(UserError, match=rf"cache_dir=.*{says} may write there.*shared_cache=true"):
        check_private(tmp_path, "cache_dir")


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    if os.geteuid() == 0:
        os.chown(tmp_path, 4321, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(UserError, match="user .*, who owns it, may write there"):
        check_private(tmp_path, "cache_dir")


def test_ones_own_folder_is_taken_also_where_a_private_group_may_write(tmp_path, monkeypatch):
    check_private(tmp_path, "cache_dir")
    name = private._user_name(os.geteuid())
    monkeypatch.setattr(grp, "getgrgid", lambda number: grp.struct_group((name, "", number, [])))
    tmp_path.chmod(0o775)
    check_private(tmp_path, "cache_dir")


@pytest.mark.parametrize(("umask", "made"), [(0o002, True), (0o000, True), (0o022, False)])
def test_a_folder_that_the_umask_would_share_is_made_private(umask, made, tmp_path):
    before = os.umask(umask)
    try:
        check_private(tmp_path / "a/cache", "cache_dir")
    finally:
        assert os.umask(before) == umask
    assert (tmp_path / "a/cache").exists() == made
    assert not made or (tmp_path / "a/cache").stat().st_mode & 0o777 == 0o755


def test_a_shared_cache_has_to_be_asked_for(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    words = ("mode=doctor", "data.root=nowhere", "cache_dir=cache")
    assert "every user of this machine may write there" in call(tmp_path, *words).err
    assert "may write there" not in call(tmp_path, *words, "shared_cache=true").err
