"""Folders searched for files: what is hidden, what is linked, and links that lead in circles."""

import pytest

from dinoseg.files import visible_files


def names(top):
    return [(parent / file).relative_to(top).as_posix() for parent, files in visible_files(top) for file in files]


@pytest.fixture
def top(tmp_path):
    for path in ("set/b.png", "set/.hidden", "set/a.png", "set/.git/c", "set/in/deep/d", "set/in/c", "other/e"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path / "set"


def test_visible_files_in_order(top):
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


def test_two_folders_that_link_to_each_other(tmp_path):
    for one, other in ("ab", "ba"):
        (tmp_path / one).mkdir()
        (tmp_path / one / f"{one}.png").touch()
        (tmp_path / one / "to").symlink_to(tmp_path / other)
    assert names(tmp_path) == ["a/a.png", "a/to/b.png", "b/b.png", "b/to/a.png"]
