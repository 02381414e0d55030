"""Files and folders that appear whole or not at all."""

import errno
import json
import os
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest

from dinoseg.utils.atomic import _machine, atomic_file, atomic_folder, write_json, write_text
from dinoseg.utils.errors import UserError, file_errors_as_user_errors


def test_a_file_takes_its_name_at_the_end_or_vanishes(tmp_path):
    path = tmp_path / "deep" / "a.bin"
    with atomic_file(path) as part, atomic_file(path) as other:  # names are random
        part.write_bytes(b"1")
        assert not path.exists() and part != other and str(os.getpid()) in part.name
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as part:
        part.write_bytes(b"2")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"1" and list(path.parent.iterdir()) == [path]


def test_a_link_at_a_temporary_name_is_never_written_through(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda count: "00" * count)  # as known to somebody who guesses it
    mine, shared = tmp_path / "mine", tmp_path / "shared"
    shared.mkdir()
    mine.write_text("of value")
    for name in ("a", "b", "gone"):
        part = f".{name}.{os.getpid()}-{_machine()}-00000000.part"
        (shared / part).symlink_to(mine if name == "a" else tmp_path / "new")
    for write in (atomic_file(shared / "a"), atomic_folder(shared / "b"), atomic_file(shared / "gone")):
        with pytest.raises(FileExistsError), write:
            pass
    assert mine.read_text() == "of value" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_write_that_fails_names_the_file(tmp_path, number):
    path = tmp_path / "results.json"
    path.write_text("old")
    refused = pytest.raises(UserError, match=f"Cannot read or write {re.escape(str(path))}: {os.strerror(number)}")
    with refused, file_errors_as_user_errors(tmp_path), atomic_file(path):
        raise OSError(number, os.strerror(number))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full", "other"), OSError(errno.EIO, "failed"), OSError("odd")]
)
def test_a_write_does_not_rename_the_file_of_an_error(tmp_path, error):
    text = str(error)
    with pytest.raises(OSError) as raised, atomic_file(tmp_path / "results.json"):
        raise error
    assert str(raised.value) == text


def test_invalid_json_is_refused_and_preserves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"é": "漢"})
    assert '"é": "漢"' in path.read_text(encoding="utf-8"), "names stay as people read them"


def test_a_failing_rename_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a.txt", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_name_that_cannot_be_taken_leaves_the_old_result(tmp_path, monkeypatch):
    folder = tmp_path / "a_segmentation"
    replace = os.replace
    folder.mkdir()
    (folder / "old.txt").write_text("old")

    def refuse_part(source, target):
        if source.suffix == ".part":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_part)
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["a_segmentation", "old.txt"]


def test_atomic_folder_appears_at_the_end_and_replaces_another(tmp_path):
    for name in ("a", f".a.999999999-{_machine()}-00000000.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old.txt").touch()
    for place in ("a", "deep/b"):
        with atomic_folder(tmp_path / place) as part:
            (part / "new.txt").touch()
            assert not (tmp_path / place / "new.txt").exists()
    found = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))]
    assert found == ["a", "a/new.txt", "deep", "deep/b", "deep/b/new.txt"]


def test_undecodable_name_is_written_as_escapes(tmp_path):
    write_text(tmp_path / "a.txt", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "a.txt").read_text() == "caf\\udce9"


KILLED = """if True:
    import os, signal, sys
    from pathlib import Path
    from dinoseg.utils.atomic import scratch_folder, atomic_file, atomic_folder
    here, replace = Path(sys.argv[1]), os.replace
    def die(source, target):
        replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    file, whole = atomic_file(here / "a.bin"), atomic_folder(here / "b")
    with scratch_folder(here, "export") as folder, file as part, whole as new:
        (folder / "model.onnx").write_bytes(b"half")
        part.write_bytes(b"half")
        (new / "new.txt").touch()
        os.replace = die  # once the older folder is put aside
"""


def test_next_process_removes_only_files_of_killed_processes(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/old.txt").touch()
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env={"PYTHONPATH": os.pathsep.join(sys.path)})
    left = sorted(re.sub(r"\d+-\w{6}-\w{8}", "MARK", found.name) for found in tmp_path.iterdir())
    assert done.returncode == -9 and left == [".a.bin.MARK.part", ".b.MARK.old", ".b.MARK.part", ".export.MARK.part"]
    machine = _machine()
    elsewhere = ("0" if machine[0] != "0" else "1") + machine[1:]
    theirs = [f".c.{os.getppid()}-{machine}-00000000.part", f".d.999999999-{elsewhere}-00000000.part"]
    theirs += [".e.999999999.part", ".f.part"]
    for name in theirs:
        (tmp_path / name).touch()
    write_text(tmp_path / "new.txt", "")
    assert {found.name for found in tmp_path.iterdir()} == {"b", "new.txt", *theirs}
    assert (tmp_path / "b/old.txt").exists()
