import stat
import zipfile

import pytest

from dinoseg.tasks.preparation import sarrarp
from dinoseg.tasks.preparation.sarrarp import unpack
from dinoseg.utils.errors import UserError

CONTENT = {
    "video_left.avi": b"a" * 1000,
    "segmentation/000000000.png": b"mask",
    "action_discrete.txt": b"0,1",
}


def pack(path, content, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as opened:
        for name, data in content.items():
            opened.writestr(name, data)
    return path


def folder_contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("top", ["", "video_07/", "./video_07/", "train1/Video 7/"])
def test_archives_with_and_without_top_folder_are_unpacked(tmp_path, top):
    archive = pack(tmp_path / "video_07.zip", {top + name: data for name, data in CONTENT.items()})
    assert unpack(archive, tmp_path / "out", landmark="video_left.avi") == 3
    assert folder_contents(tmp_path / "out") == CONTENT


def test_files_added_by_desktops_are_not_unpacked(tmp_path):
    junk = {
        "__MACOSX/._video_left.avi": b"x",
        ".DS_Store": b"x",
        "segmentation/": b"",
        "segmentation/._0.png": b"x",
    }
    unpack(pack(tmp_path / "v.zip", {**junk, **CONTENT}), tmp_path / "out", landmark="video_left.avi")
    assert folder_contents(tmp_path / "out") == CONTENT


def test_unpacking_resumes_where_it_stopped(tmp_path):
    out = tmp_path / "out"
    archive = pack(tmp_path / "v.zip", CONTENT)
    unpack(archive, out, landmark="video_left.avi")
    before = (out / "video_left.avi").stat().st_mtime_ns
    (out / "action_discrete.txt").unlink()
    (out / "segmentation/000000000.png").write_bytes(b"MASK")
    unpack(archive, out, landmark="video_left.avi")
    assert folder_contents(out) == CONTENT and (out / "video_left.avi").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "name", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:evil.txt", "a/..", "."]
)
def test_paths_outside_are_refused(tmp_path, name):
    archive = pack(tmp_path / "v.zip", {**CONTENT, name: b"x"})
    with pytest.raises(UserError, match=r"v\.zip names a path outside"):
        unpack(archive, tmp_path / "in/out", landmark="video_left.avi")
    assert [p.name for p in tmp_path.rglob("*")] == ["v.zip"]


def test_links_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as opened:
        info = zipfile.ZipInfo("segmentation")
        info.create_system = 3
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(info, "/etc")
    with pytest.raises(UserError, match=r"holds a link \(segmentation\)"):
        unpack(tmp_path / "v.zip", tmp_path / "out", landmark="video_left.avi")


def test_a_file_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "v.zip", "w") as opened:
        opened.writestr("a.txt", "1")
        opened.writestr("a.txt", "2")
    with pytest.raises(UserError, match=r"a\.txt twice"):
        unpack(tmp_path / "v.zip", tmp_path / "out", landmark="video_left.avi")


def test_bombs_are_refused(tmp_path, monkeypatch):
    archive = pack(tmp_path / "v.zip", {"video_left.avi": bytes(2**20)})
    monkeypatch.setattr(sarrarp, "_RATIO_MATTERS", 2**19)
    with pytest.raises(UserError, match=r"would unpack to \d{3,4} times its size"):
        unpack(archive, tmp_path / "out", landmark="video_left.avi")
    assert not (tmp_path / "out").exists()


def test_archive_larger_than_the_free_disk_is_refused(tmp_path, monkeypatch):
    usage = sarrarp.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sarrarp.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match="unpacks to 0 MiB, .*out has 0 MiB free. Free some space"):
        unpack(pack(tmp_path / "v.zip", CONTENT), tmp_path / "out", landmark="video_left.avi")
    assert folder_contents(tmp_path / "out") == {}


def test_damage_is_reported_and_nothing_half_written(tmp_path):
    archive = pack(tmp_path / "v.zip", CONTENT, zipfile.ZIP_STORED)
    data = bytearray(archive.read_bytes())
    data[200] ^= 1  # inside the video
    archive.write_bytes(data)
    with pytest.raises(UserError, match=r"v\.zip is damaged .*video_left\.avi.*download it again"):
        unpack(archive, tmp_path / "out", landmark="video_left.avi")
    assert folder_contents(tmp_path / "out") == {}
    archive.write_bytes(data[:500])
    with pytest.raises(UserError, match=r"v\.zip is damaged"):
        unpack(archive, tmp_path / "out", landmark="video_left.avi")
    archive.write_bytes(b"")
    with pytest.raises(UserError, match=r"v\.zip is damaged"):
        unpack(archive, tmp_path / "out", landmark="video_left.avi")


def test_undecodable_name_in_an_archive_is_damage(tmp_path):
    archive = pack(tmp_path / "v.zip", {"\u00e9.txt": b"a"})
    archive.write_bytes(archive.read_bytes().replace("\u00e9".encode(), b"\xff\xfe"))
    with pytest.raises(UserError, match=r"v\.zip is damaged"):
        unpack(archive, tmp_path / "out", landmark="video_left.avi")


def test_an_offset_before_the_file_is_damage(tmp_path):
    archive = pack(tmp_path / "v.zip", CONTENT)
    data = bytearray(archive.read_bytes())
    data[-6:-2] = (len(data)).to_bytes(4, "little")  # where its list of files begins
    archive.write_bytes(data)
    with pytest.raises(UserError, match=r"v\.zip is damaged"):
        unpack(archive, tmp_path / "out", landmark="video_left.avi")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_few_archives_have_are_refused(method, tmp_path):
    with pytest.raises(
        UserError,
        match=r"v\.zip cannot be unpacked .* uses compression method 1[24]\): unpack it by "
        "hand",
    ):
        unpack(pack(tmp_path / "v.zip", CONTENT, method), tmp_path / "out", landmark="video_left.avi")


def test_encrypted_archives_are_named(tmp_path):
    archive = pack(tmp_path / "v.zip", {"a.txt": b"secret"})
    data = bytearray(archive.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag that says: needs a password
    archive.write_bytes(data)
    with pytest.raises(UserError, match=r"v\.zip cannot be unpacked .*password.*by hand into .*out"):
        unpack(archive, tmp_path / "out", landmark="video_left.avi")
