"""What a run makes it may remove, and nothing else; what the system says of files and disks is a message."""

import errno
import logging
import os
from pathlib import Path

import pytest
from command_line import call
from omegaconf import OmegaConf

from dinoseg.experiment import folder as run_folder
from dinoseg.experiment.folder import claim, drop_bare, drop_empty, has_results, release, write_config
from dinoseg.experiment.log_file import LogFile
from dinoseg.experiment.unread import warn_unread
from dinoseg.modes import score
from dinoseg.report.log import RunLog
from dinoseg.report.loggers.logger import Logger
from dinoseg.utils.atomic import _machine
from dinoseg.utils.errors import UserError, file_errors_as_user_errors

WRONG = ("mode=score", "protocol=davis2017")  # ends before it does anything: no folders are named


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("made", "options"),
    [
        ("outputs", ()),
        ("outputs/base", ()),
        ("mine", ("hydra.run.dir=mine",)),
        ("outputs", ("hydra.run.dir=mine",)),
        ("mine", ("-m", "seed=0,1", "hydra.sweep.dir=mine")),
    ],
)
def test_folders_of_the_user_stay_and_those_of_the_run_go(tmp_path, made, options):
    (tmp_path / made).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    done = call(tmp_path, *options, *WRONG)
    assert done.status == 1 and "Traceback" not in done.err
    if "-m" not in options:
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / made).is_dir()


def test_a_config_folder_of_the_user_stays(tmp_path):
    (tmp_path / "mine/config").mkdir(parents=True)
    (tmp_path / "mine/config/notes.txt").touch()
    assert call(tmp_path, *WRONG, "hydra.run.dir=mine").status == 1
    assert (tmp_path / "mine/config/notes.txt").exists()


def test_dropping_never_fails(tmp_path):
    drop_empty(tmp_path / "gone")
    drop_bare(tmp_path / "gone")
    folder = claim(tmp_path / "outputs/base/run")
    write_config({}, folder, [])
    (folder / "some.png").touch()
    drop_bare(folder)
    assert (folder / "run.log").exists() and (folder / "config").exists()
    (folder / "some.png").unlink()
    drop_bare(folder)
    release(folder)
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_new_run_removes_remains_of_a_killed_export(tmp_path):
    half = tmp_path / f"run/.export.999999999-{_machine()}-00000000.part"
    half.mkdir(parents=True)
    (half / "model.onnx").write_bytes(b"half")
    (tmp_path / "run/run.log").touch()
    folder = claim(tmp_path / "run")
    release(folder)
    assert folder == tmp_path / "run_2" and [path.name for path in (tmp_path / "run").iterdir()] == ["run.log"]


def test_nonempty_log_is_preserved_and_is_no_result(tmp_path):
    folder = claim(tmp_path / "run")
    write_config({}, folder, [])
    (folder / "run.log").write_text("what was left out, and why")
    assert not has_results(folder)
    drop_bare(folder)
    release(folder)
    assert (folder / "run.log").exists() and (folder / "config").exists()


def test_configs_of_continuations_take_the_next_free_name(tmp_path):
    for _ in range(3):
        write_config({}, tmp_path, [])
    (tmp_path / "config_2/config.yaml").unlink()
    (tmp_path / "config_2/overrides.txt").unlink()
    (tmp_path / "config_2").rmdir()
    write_config({}, tmp_path, ["seed=3"])
    assert (tmp_path / "config_2/overrides.txt").read_text() == "seed=3\n"


def test_undecodable_overrides_are_stored_as_typed(tmp_path):
    write_config(OmegaConf.create({"root": "caf\udce9"}), tmp_path, ["data.root=caf\udce9"])  # as Python reads argv
    assert (tmp_path / "config/overrides.txt").read_bytes() == b"data.root=caf\xe9\n"
    assert run_folder.command_line(tmp_path) == ["data.root=caf\ufffd"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda where, _: (where / "outputs").touch(), "outputs"),
        (lambda where, patch: patch.setattr(run_folder.OmegaConf, "save", full), "No space left on device; "),
        (
            lambda where, patch: patch.setattr(score, "run", full),
            "MiB are free there. Free some space and run it again",
        ),
        (
            lambda where, patch: patch.setattr(
                score, "run", lambda *_, **__: open(where / "gone/a.png", encoding="utf-8")
            ),
            "gone/a.png: No",
        ),
    ],
)
def test_system_errors_become_messages(tmp_path, monkeypatch, make, said):
    make(tmp_path, monkeypatch)
    done = call(tmp_path, "mode=score")
    assert done.status == 1 and done.err.startswith("error: Cannot read or write ") and said in done.err
    assert "Traceback" not in done.err and not (tmp_path / "outputs/base").exists()


def test_a_run_folder_with_too_long_a_name(tmp_path):
    done = call(tmp_path, "mode=score", f"hydra.run.dir={'a' * 300}")
    assert done.status == 1 and "no file name has 300 characters. Give a shorter one." in done.err


def test_errors_unrelated_to_files_preserve_their_traceback():
    for error in (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), OSError("a hub does not answer")):
        with pytest.raises(OSError) as raised, file_errors_as_user_errors(Path()):
            raise error
        assert raised.value is error
    with (
        pytest.raises(UserError, match="Cannot read or write b.png: Permission denied. Give your user"),
        file_errors_as_user_errors(Path()),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", "a.png", None, "b.png")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_log_on_a_full_disk_reports_once_and_stops(tmp_path, capsys, caplog):
    handler = LogFile("/dev/full")
    root = logging.getLogger()
    root.addHandler(handler)
    for _ in range(3):
        logging.getLogger("dinoseg").warning("going on")
    assert handler not in root.handlers and "Traceback" not in capsys.readouterr().err
    assert [record.getMessage() for record in caplog.records if "ends here" in record.getMessage()] == [
        "/dev/full ends here (No space left on device)."
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_rows_on_a_full_disk_are_an_error_and_close_the_rest(tmp_path):
    closed = []
    with pytest.raises(UserError, match="No space left"), file_errors_as_user_errors(tmp_path):
        board = type("Board", (Logger,), {"close": lambda self, *, status: closed.append(True)})
        log = RunLog(tmp_path, {"board": board})
        log._file.close()
        log._file = Path("/dev/full").open("w", encoding="utf-8")
        with log:
            log.scalars(1, {"train/loss": 1.0})
    assert closed


def test_stored_overrides_are_shown_without_control_codes(tmp_path, caplog):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/overrides.txt").write_bytes(b"tracker.\x1b[2J=3\nslots.\xff=1\n")
    warn_unread(tmp_path, ("tracker", "slots"), "Because.")
    said = caplog.text
    assert "No effect here: tracker.\\x1b[2J=3, slots." in said and "\x1b" not in said


def test_invalid_overrides_file_yields_no_command_line(tmp_path):
    assert run_folder.command_line(tmp_path) == run_folder.last_command_line(tmp_path) == []
    write_config({}, tmp_path, ["a=1"])
    with (tmp_path / "config/overrides.txt").open("r+b") as file:
        file.truncate(2**18)
        assert run_folder.command_line(tmp_path)[0] == "a=1"
        file.truncate(2**18 + 1)  # whoever wrote it, it is none that was typed
    assert run_folder.command_line(tmp_path) == run_folder.last_command_line(tmp_path) == []
    (tmp_path / "config/overrides.txt").unlink()
    os.mkfifo(tmp_path / "config/overrides.txt")
    assert run_folder.command_line(tmp_path) == run_folder.last_command_line(tmp_path) == []


def test_damaged_line_hides_no_remembered_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        run_folder.remember_folder(tmp_path / "cache", tmp_path / name)
        (path,) = (tmp_path / "cache").iterdir()
        path.write_bytes(path.read_bytes() + b'"cut by a full disk \xff\n7\n')
    assert [*run_folder.remembered_folders(tmp_path / "cache")] == [tmp_path / "first", tmp_path / "second"]


def test_a_pipe_in_place_of_a_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "run.log")
    with pytest.raises(UserError, match="is a named pipe"):
        run_folder.lock(tmp_path)
