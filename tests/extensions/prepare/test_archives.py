import stat
import zipfile
from pathlib import Path

import pytest
from mistakes import assert_refused, refusals

from dinoseg.extensions.prepare import sarrarp
from dinoseg.extensions.prepare.sarrarp import unpack

CONTENT = {
    "video_left.avi": b"a" * 1000,
    "segmentation/000000000.png": b"mask",
    "action_discrete.txt": b"0,1",
}


def pack(path, content=CONTENT, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as opened:
        for name, data in content.items():
            opened.writestr(name, data)
    return path


def folder_contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("top", ["", "video_07/", "./video_07/", "train1/Video 7/"])
def test_archives_with_and_without_top_folder_are_unpacked(tmp_path, top):
    """Files that desktops add are not."""
    names = ("__MACOSX/._video_left.avi", ".DS_Store", f"{top}segmentation/", f"{top}segmentation/._0.png")
    content = dict.fromkeys(names, b"x") | {top + name: data for name, data in CONTENT.items()}
    assert unpack(pack(tmp_path / "video_07.zip", content), tmp_path / "out", landmark="video_left.avi") == 3
    assert folder_contents(tmp_path / "out") == CONTENT


def test_unpacking_resumes_where_it_stopped(tmp_path):
    out = tmp_path / "out"
    archive = pack(tmp_path / "v.zip")
    unpack(archive, out, landmark="video_left.avi")
    before = (out / "video_left.avi").stat().st_mtime_ns
    (out / "action_discrete.txt").unlink()
    (out / "segmentation/000000000.png").write_bytes(b"MASK")
    unpack(archive, out, landmark="video_left.avi")
    assert folder_contents(out) == CONTENT and (out / "video_left.avi").stat().st_mtime_ns == before


def refuse(write, *arguments):
    """Return a function that writes v.zip and unpacks it, after which no other file is there."""

    def act():
        write(Path("v.zip"), *arguments)
        try:
            unpack(Path("v.zip"), Path("in/out"), landmark="video_left.avi")
        finally:
            assert [*folder_contents(Path())] == ["v.zip"]

    return act


def write_link(path):
    with zipfile.ZipFile(path, "w") as opened:
        info = zipfile.ZipInfo("segmentation")
        info.create_system = 3
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(info, "/etc")


def write_twice(path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as opened:
        opened.writestr("a.txt", "1")
        opened.writestr("a.txt", "2")


def write_damaged(path, change):
    data = bytearray(pack(path, CONTENT, zipfile.ZIP_STORED).read_bytes())
    path.write_bytes(change(data) or data)


def flip_video(data):
    data[200] ^= 1  # inside the video


def move_list(data):
    data[-6:-2] = len(data).to_bytes(4, "little")  # where the list of files begins


def encrypt(data):
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag that says: needs a password


def write_undecodable(path):
    pack(path, {"\u00e9.txt": b"a"})
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xff\xfe"))


OUTSIDE = ("../evil.txt", "a/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:evil.txt", "a/..", ".")
METHOD = "v.zip cannot be unpacked ", "unpack it by hand"
test_message_names_archive_and_remedy = refusals(
    {
        **{f"path {name}": (refuse(pack, {**CONTENT, name: b"x"}), "v.zip names a path outside") for name in OUTSIDE},
        "link": (refuse(write_link), "holds a link (segmentation)"),
        "a file twice": (refuse(write_twice), "a.txt twice"),
        "damage": (refuse(write_damaged, flip_video), "v.zip is damaged ", "video_left.avi", "download it again"),
        "cut": (refuse(write_damaged, lambda data: data[:500]), "v.zip is damaged"),
        "empty": (refuse(lambda path: path.touch()), "v.zip is damaged"),
        "undecodable name": (refuse(write_undecodable), "v.zip is damaged"),
        "offset before the file": (refuse(write_damaged, move_list), "v.zip is damaged"),
        "bzip2": (refuse(pack, CONTENT, zipfile.ZIP_BZIP2), *METHOD, "uses compression method 12)"),
        "lzma": (refuse(pack, CONTENT, zipfile.ZIP_LZMA), *METHOD, "uses compression method 14)"),
        "encrypted": (refuse(write_damaged, encrypt), "v.zip cannot be unpacked ", "password", "by hand into ", "out"),
    }
)


def test_bombs_and_archives_beyond_the_free_disk_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sarrarp, "_RATIO_MATTERS", 2**19)
    assert_refused(refuse(pack, {"video_left.avi": bytes(2**20)}), "would unpack to ", " times its size")
    usage = sarrarp.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sarrarp.shutil, "disk_usage", lambda _: usage._replace(free=100))
    assert_refused(refuse(pack), "unpacks to 0 MiB, ", "out has 0 MiB free. Free some space")
