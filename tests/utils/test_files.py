"""Folders searched for files: what is hidden, what is linked, and links that lead in circles."""

import errno
import os
import socket
from functools import partial
from pathlib import Path

import pytest
from mistakes import assert_refused

from dinoseg.extensions.clips.videos import video_folders
from dinoseg.extensions.video.index import open_decoder
from dinoseg.extensions.video.pictures import picture_files
from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.extensions.video.sarrarp_files import png_files
from dinoseg.inference.inputs import list_inputs
from dinoseg.utils.files import check_exists, check_regular, entries, expand_path, visible_files
from dinoseg.utils.images import has_one_bit, read_ids, read_image, read_size


def names(top):
    return [(parent / file).relative_to(top).as_posix() for parent, files in visible_files(top) for file in files]


@pytest.fixture
def top(tmp_path):
    for path in ("set/b.png", "set/.hidden", "set/a.png", "set/.git/c", "set/in/deep/d", "set/in/c", "other/e"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path / "set"


def test_visible_files_are_sorted(top):
    assert names(top) == ["a.png", "b.png", "in/c", "in/deep/d"]
    (top / "x.png").mkdir()
    (top / "gone").symlink_to(top / "nowhere")  # a file that cannot be read is its reader's to tell
    assert names(top) == ["a.png", "b.png", "gone", "in/c", "in/deep/d"]


def test_links_are_followed_once_or_more_often_but_never_upwards(top):
    (top / "in/linked").symlink_to(top.parent / "other")
    (top / "too").symlink_to(top.parent / "other")
    expected = ["a.png", "b.png", "in/c", "in/deep/d", "in/linked/e", "too/e"]
    assert names(top) == expected
    (top / "in/deep/self").symlink_to(".")
    (top / "in/deep/up").symlink_to(top)
    (top / "in/deep/far").symlink_to(top.parent)
    (top.parent / "other/back").symlink_to(top / "in")
    found = names(top)
    assert set(expected) <= set(found) and len(found) == len(expected) + 2  # `too/back` shows in/ a second time
    assert {"too/back/c", "too/back/deep/d"} <= set(found)


def test_a_link_to_the_folder_itself_can_be_searched(top):
    (top.parent / "link").symlink_to(top)
    (top / "again").symlink_to(top.parent / "link")
    assert names(top.parent / "link") == names(top) == ["a.png", "b.png", "in/c", "in/deep/d"]


def refuse(patch, name, folder):
    """Let a function of `os` that lists folders refuse one of them."""
    real = getattr(os, name)

    def list_folder(path="."):
        if os.fspath(path) == str(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return real(path)

    patch.setattr(os, name, list_folder)


def test_a_folder_that_may_not_be_read_is_an_error(top, monkeypatch):
    refuse(monkeypatch, "scandir", top / "in/deep")
    assert_refused(lambda: names(top), "Cannot read the folder ", "in/deep (Permission denied)", "Give your user read")
    assert [path.name for path in entries(top)] == ["a.png", "b.png", "in"]
    assert entries(top / "nowhere") == entries(top / "a.png") == []
    for listing in ("listdir", "scandir"):  # pathlib lists folders by the second since Python 3.14
        refuse(monkeypatch, listing, top)
    for list_folder in (entries, picture_files, video_folders, png_files, lambda folder: list_inputs(str(folder))):
        assert_refused(partial(list_folder, top), "Cannot read the folder ", "set (Permission denied)")


def test_path_of_another_user_is_not_called_missing(tmp_path, monkeypatch):
    closed, stat = tmp_path / "closed/data", Path.stat

    def refuse(path, **options):
        if path == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(PermissionError):
        check_exists(closed, "data.root", "")
    assert_refused(lambda: check_exists(tmp_path / "none", "data.root", "Check it."), "none: file or folder not found")
    assert_refused(lambda: check_exists("a" * 5000, "data.root", "Check it."), "file or folder not found")


def test_irregular_files_are_refused_without_waiting(tmp_path):
    pipe, folder, loop = tmp_path / "pipe.png", tmp_path / "folder.png", tmp_path / "loop.png"
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / ".s"))
        assert_refused(lambda: check_regular(tmp_path / ".s"), "is a socket")
    for read in (read_image, read_ids, read_size, VideoReader, open_decoder, has_one_bit):
        assert_refused(partial(read, pipe), "pipe.png is a named pipe. Put a file there, or remove it")
    assert_refused(lambda: read_image("/dev/zero"), "is a device. Put a file there")
    assert_refused(lambda: read_image(folder), "folder.png is a folder")
    assert_refused(lambda: read_image(loop), "loop.png (Too many levels of symbolic links)")
    assert names(tmp_path) == ["loop.png", "pipe.png"]
    assert [path.name for path in list_inputs(str(tmp_path))] == ["loop.png", "pipe.png"]  # reading tells of them


@pytest.mark.parametrize("name", ["dinoseg:surgery", "dinoseg:../surgery", "dinoseg:/etc/surgery"])
def test_packaged_names_lead_to_the_package_alone(name):
    path = expand_path(name, ".jpg")
    assert path.is_file() and path.parent.name == "assets" and path.name == "surgery.jpg"


def test_other_names_are_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_path("~/a.b", ".jpg") == tmp_path / "a.b" and expand_path(tmp_path, ".jpg") == tmp_path
