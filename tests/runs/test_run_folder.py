"""What a run makes it may remove, and nothing else; what the system says of files and disks is a message."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from command_line import call
from mistakes import assert_refused, command, refusals
from omegaconf import OmegaConf

from dinoseg.checkpoints.unread import warn_unread
from dinoseg.experiment.settings import check_same_settings
from dinoseg.extensions.protocols import score_mode as score
from dinoseg.runs import folder as folder_module
from dinoseg.runs.folder import (
    RunFolder,
    command_line,
    command_lines,
    has_results,
    last_command_line,
    record_new_folders,
)
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
        ("mine/config/notes", ("hydra.run.dir=mine",)),
        ("outputs", ("hydra.run.dir=mine",)),
        ("mine", ("-m", "seed=0,1", "hydra.sweep.dir=mine")),
    ],
)
def test_folders_of_the_user_stay_and_those_of_the_run_go(tmp_path, made, options):
    (tmp_path / made).mkdir(parents=True)
    before = {*tmp_path.rglob("*")}
    done = call(tmp_path, *options, *WRONG)
    assert done.status == 1 and "Traceback" not in done.err
    if "-m" not in options and made != "mine/config/notes":
        assert {*tmp_path.rglob("*")} == before
    assert (tmp_path / made).is_dir()


def fail_in(folder, fill=lambda path: None):
    """Claim a folder, write a config and further files, and end with an error of the user's."""
    with pytest.raises(UserError), RunFolder(folder) as run:
        run.claim(folder)
        run.write_config({}, [])
        fill(run.path)
        raise UserError("a mistake")


def test_failed_job_leaves_files_with_content_alone(tmp_path):
    folder = tmp_path / "outputs/base/run"
    fail_in(folder)
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())
    fail_in(folder, lambda path: (path / "some.png").touch())
    assert (folder / "run.log").exists() and (folder / "config").exists() and has_results(folder)
    fail_in(folder, lambda path: (path / "run.log").write_text("what was left out, and why"))
    other = folder.with_name("run_2")
    assert (other / "run.log").exists() and (other / "config").exists() and not has_results(other)


def test_a_crashed_job_leaves_its_config_and_releases_its_folder(tmp_path):
    with pytest.raises(RuntimeError), RunFolder(tmp_path / "run") as run:
        run.claim(tmp_path / "run")
        run.write_config({}, [])
        raise RuntimeError("a fault of the program")
    assert (tmp_path / "run/config/config.yaml").is_file()
    with RunFolder(tmp_path / "run") as other:
        assert other.try_to_enter(tmp_path / "run")


def test_failed_resume_removes_its_config_only(tmp_path):
    with RunFolder(tmp_path / "run") as run:
        run.claim(tmp_path / "run")
        run.write_config({}, [])
        (run.path / "metrics.jsonl").touch()
    for is_continued in (False, True):
        with pytest.raises(UserError), RunFolder(tmp_path / "planned") as run:
            run.enter(tmp_path / "run")
            assert run.write_config({}, []).name == "config_2"
            if is_continued:
                (run.path / "metrics.jsonl").write_text("{}")
            raise UserError("a mistake")
        assert (tmp_path / "run/config_2").exists() == is_continued and (tmp_path / "run/config").exists()


def test_planned_folder_goes_once_the_job_writes_elsewhere(tmp_path):
    planned = tmp_path / "outputs/base/eval"
    record_new_folders(planned)
    planned.mkdir(parents=True)  # Hydra has
    with RunFolder(planned) as run:
        run.claim(tmp_path / "outputs/camvid/eval")
        assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["camvid"]


def test_job_without_a_folder_of_its_own_fails_quietly(tmp_path):
    with pytest.raises(UserError), RunFolder(tmp_path / "gone"):
        raise UserError("a mistake")
    assert not list(tmp_path.iterdir())


def test_command_lines_are_listed_from_start_to_last_resume(tmp_path):
    commands = [["seed=1"], ["resume=auto", "trainer.steps=7"], ["resume=auto", "trainer.steps=8"]]
    for second, words in enumerate(commands):
        folder = RunFolder(tmp_path).write_config({}, words)
        os.utime(folder / "overrides.txt", (second, second))
    assert command_lines(tmp_path) == commands and last_command_line(tmp_path) == commands[-1]


def test_a_run_does_not_write_into_the_folder_of_a_sweep(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/multirun.yaml").touch()
    with RunFolder(tmp_path / "train") as run:
        run.claim(tmp_path / "train")  # as of a run that begins in the same second
    assert run.path == tmp_path / "train_2" and len([*(tmp_path / "train").iterdir()]) == 1


def test_configs_of_continuations_take_the_next_free_name(tmp_path):
    for _ in range(3):
        RunFolder(tmp_path).write_config({}, [])
    shutil.rmtree(tmp_path / "config_2")
    RunFolder(tmp_path).write_config({}, ["seed=3"])
    assert (tmp_path / "config_2/overrides.txt").read_text() == "seed=3\n"


def test_undecodable_overrides_are_stored_as_typed(tmp_path):
    RunFolder(tmp_path).write_config(
        OmegaConf.create({"root": "caf\udce9"}), ["data.root=caf\udce9"]
    )  # as Python reads argv
    assert (tmp_path / "config/overrides.txt").read_bytes() == b"data.root=caf\xe9\n"
    assert command_line(tmp_path) == ["data.root=caf\ufffd"]


def open_gone(where):
    return lambda *_, **__: open(where / "gone/a.png", encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda where, _: (where / "outputs").touch(), "outputs"),
        (lambda where, patch: patch.setattr(folder_module.OmegaConf, "save", full), "No space left on device; "),
        (lambda where, patch: patch.setattr(score, "run", full), "MiB are free there. Free some space and run it"),
        (lambda where, patch: patch.setattr(score, "run", open_gone(where)), "gone/a.png: No"),
    ],
)
def test_system_errors_become_messages(tmp_path, monkeypatch, make, said):
    make(tmp_path, monkeypatch)
    done = call(tmp_path, "mode=score")
    assert done.status == 1 and done.err.startswith("error: Cannot read or write ") and said in done.err
    assert "Traceback" not in done.err and not (tmp_path / "outputs/base").exists()


def test_errors_unrelated_to_files_preserve_their_traceback():
    for error in (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), OSError("a hub does not answer")):
        with pytest.raises(OSError) as raised, file_errors_as_user_errors(Path()):
            raise error
        assert raised.value is error


@pytest.mark.parametrize(
    ("words", "unread", "named"),
    [
        (b"mode=track slots=lock_on tracker.short_side=4", ["slots"], "slots=lock_on"),
        (b"slots.match=auto slots.extra_slots=0", ["slots"], "slots.match=auto, slots.extra_slots=0"),
        (b"+slots.match=auto tracker.dtype=x", ["tracker.dtype", "slots"], "+slots.match=auto, tracker.dtype=x"),
        (b"tracker=crw tracker.context=3", ["tracker.short_side", "tracker.first"], None),
        (b"slotsize=3 head.slots=2 tracker.shorter=1", ["slots", "tracker.short_side"], None),
        (b"tracker.\x1b[2J=3 tracker.\xff=1", ["tracker"], "tracker.\\x1b[2J=3, tracker.\ufffd=1"),
        (b"", ["slots"], None),
        (None, ["slots"], None),
    ],
)
def test_overrides_without_effect_are_named(tmp_path, caplog, words, unread, named):
    if words is not None:
        (tmp_path / "config").mkdir()
        (tmp_path / "config/overrides.txt").write_bytes(words.replace(b" ", b"\n") + b"\n")
    warn_unread(tmp_path, unread, "Because.")
    assert [record.getMessage() for record in caplog.records] == [f"No effect here: {named}. Because."] * bool(named)
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"mode": {"skip": 2, "size": [2, 3]}, "stamp": 3}, "differ from that run: mode.skip was 1 and is 2. Use"),
        ({"mode": {"skip": 1, "size": None}, "stamp": True}, "size was [2,3] and is null; stamp was 3 and is true"),
        ({"mode": {"skip": 1, "size": [2, 3]}}, "stamp was 3 and is not set"),
    ],
)
def test_each_changed_setting_is_named(tmp_path, now, said):
    before = {"mode": {"skip": 1, "size": [2, 3]}, "stamp": 3}
    check_same_settings(tmp_path, before, {"mode": {"skip": 1, "size": (2, 3)}, "stamp": 3})
    message = assert_refused(lambda: check_same_settings(tmp_path, before, now, key="hydra.run.dir"), said)
    assert message.endswith("or start over without hydra.run.dir.")


def test_invalid_overrides_file_yields_no_command_line(tmp_path):
    assert command_line(tmp_path) == last_command_line(tmp_path) == []


def use_denied_file():
    with file_errors_as_user_errors(Path()):
        raise PermissionError(errno.EACCES, "Permission denied", "a.png", None, "b.png")


def lock_pipe():
    os.mkfifo("run.log")
    RunFolder(Path()).enter(Path())


test_message_names_value_and_remedy = refusals(
    {
        "denied file": (use_denied_file, "Cannot read or write b.png: Permission denied. Give your user"),
        "pipe for a log": (lock_pipe, "is a named pipe"),
        "long name": (command("mode=score", f"hydra.run.dir={'a' * 300}"), "File name too long. Choose a shorter path"),
    }
)


def test_a_job_holds_one_folder_by_any_of_its_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunFolder(Path("a")) as first, RunFolder(Path("c")) as second:
        first.enter(Path("a"), remedy="wait")
        assert first.try_to_enter(tmp_path / "a") and not second.try_to_enter(Path("a"))
        first.enter(Path("b"), remedy="wait")
        assert second.try_to_enter(Path("a")) and not second.try_to_enter(Path("b"))
