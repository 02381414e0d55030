"""Folders that other users may write to."""

import grp
import os

import pytest
from command_line import call
from mistakes import assert_refused

from dinoseg.utils import private
from dinoseg.utils.atomic import atomic_file
from dinoseg.utils.errors import UserError
from dinoseg.utils.private import check_private

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
NAME = private._user_name(os.geteuid()) if os.name == "posix" else ""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a folder whose folders above, which pytest makes private, do not count."""
    monkeypatch.setattr(private, "_is_shielded", lambda folder: not private._others(folder, private._ENTERABLE))
    tmp_path.chmod(0o755)
    return tmp_path


def in_group(monkeypatch, name, members=()):
    monkeypatch.setattr(grp, "getgrgid", lambda number: grp.struct_group((name, "", number, list(members))))


@pytest.mark.parametrize(
    ("mode", "says"),
    [(0o1777, "every user of this machine"), (0o757, "every user of this machine"), (0o775, "the group lab")],
)
def test_a_folder_that_others_may_write_to_is_refused(mode, says, cache, monkeypatch):
    in_group(monkeypatch, "lab")
    cache.chmod(mode)
    with pytest.raises(UserError, match=rf"cache_dir=.*{says} may write there,.*shared_cache=true"):
        check_private(cache, "cache_dir")


@pytest.mark.parametrize("place", ["features", "features/abc"])
def test_a_folder_below_that_others_may_write_to_is_refused(place, cache, monkeypatch):
    in_group(monkeypatch, "lab")
    (cache / "features/abc").mkdir(parents=True)
    (cache / place).chmod(0o775)
    with pytest.raises(UserError, match=rf"the group lab may write there \(to {place}\).*chmod -R go-w"):
        check_private(cache, "cache_dir")
    cache.chmod(0o700)
    check_private(cache, "cache_dir")


def test_folder_below_a_private_one_is_private(tmp_path, monkeypatch):
    in_group(monkeypatch, "lab")
    (tmp_path / "home/cache").mkdir(parents=True)
    (tmp_path / "home/cache").chmod(0o775)
    (tmp_path / "home").chmod(0o700)
    check_private(tmp_path / "home/cache", "cache_dir")


def test_a_folder_of_another_user_is_refused(cache, monkeypatch):
    if os.geteuid() == 0:
        os.chown(cache, 4321, -1)
    else:
        monkeypatch.setattr(private, "_trusted_owners", lambda folder: {0})
    assert_refused(lambda: check_private(cache, "cache_dir"), "user ", ", who owns it, may write there")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives folders away")
def test_root_takes_the_cache_of_the_user_who_owns_the_project(cache):
    (cache / "cache").mkdir()
    for folder in (cache, cache / "cache"):
        os.chown(folder, 4321, -1)
    check_private(cache / "cache", "cache_dir")


def test_file_system_without_permissions_is_used_with_a_warning(cache, monkeypatch, capsys):
    cache.chmod(0o777)
    (cache / "made").touch()
    (cache / "made").chmod(0o777)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open(cache / "made", "rb"))
    check_private(cache, "cache_dir")
    assert "does not store permissions" in capsys.readouterr().err


@pytest.mark.parametrize(("members", "is_taken"), [([], True), ([NAME], True), (["bob"], False)])
def test_own_folder_may_be_writable_by_a_private_group(cache, monkeypatch, members, is_taken):
    in_group(monkeypatch, NAME, members)
    cache.chmod(0o775)
    if is_taken:
        check_private(cache, "cache_dir")
    else:
        assert_refused(lambda: check_private(cache, "cache_dir"), f"the group {NAME} may write there")


def test_a_folder_with_an_access_control_list_is_refused(cache, monkeypatch):
    in_group(monkeypatch, NAME)
    monkeypatch.setattr(os, "listxattr", lambda path: ["system.posix_acl_access"], raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    cache.chmod(0o775)
    assert_refused(lambda: check_private(cache, "cache_dir"), "in its access control list")


@pytest.mark.parametrize(("umask", "made"), [(0o002, True), (0o000, True), (0o022, False)])
def test_a_folder_that_the_umask_would_share_is_made_private(umask, made, cache):
    folder = cache / "a/cache"
    before = os.umask(umask)
    try:
        check_private(folder, "cache_dir")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "features").mkdir()
        with atomic_file(folder / "features/a.npy") as part:
            part.write_bytes(b"1")
        check_private(folder, "cache_dir")
    finally:
        assert os.umask(before) == umask
    assert folder.stat().st_mode & 0o077 == (0 if made else 0o055)


def test_uncreatable_cache_folder_passes_the_check(tmp_path):
    (tmp_path / "file").touch()
    before = os.umask(0o002)
    try:
        check_private(tmp_path / "file/cache", "cache_dir")
    finally:
        os.umask(before)


def test_shared_cache_has_to_be_enabled(cache):
    (cache / "cache").mkdir()
    (cache / "cache").chmod(0o777)
    words = ("mode=doctor", "data.root=nowhere", "cache_dir=cache")
    assert "every user of this machine may write there" in call(cache, *words).err
    assert "may write there" not in call(cache, *words, "shared_cache=true").err
