import json
import signal
from functools import partial

import numpy as np
import pytest
from mistakes import assert_refused
from tensorboard.summary.writer import event_file_writer
from test_background_logger import RecordingLogger

from dinoseg.report.log import RunLog, read_rows
from dinoseg.report.loggers.tensorboard import TensorBoardLogger
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_image
from dinoseg.utils.interrupt import Interrupted

BOARD = {"tensorboard": TensorBoardLogger}


def read_board(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def board_scalars(folder, tag):
    return [(event.step, event.value) for event in read_board(folder).Scalars(tag)]


def test_rows_are_readable_at_once_and_reach_tensorboard(tmp_path):
    with RunLog(tmp_path, BOARD) as log:
        log.config({"seed": 0, "head": "mlp", "layers": None})
        log.scalars(1, {"train/loss": np.float32(0.5), "train/lr": 1e-4})
        assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 0.5, "train/lr": 1e-4}]
        log.scalars(2, {"val/miou": 0.25, "val/loss": float("nan"), "val/accuracy": None})
        log.images(2, {"val/prediction": np.zeros((4, 6, 3), np.uint8)})
        log.scores({"miou": 0.5, "matrix": [[1]], "dice": None})
        assert not log.views
    assert log.views == [f"TensorBoard:  tensorboard --logdir {tmp_path / 'tensorboard'}"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 2, "val/miou": 0.25, "val/loss": None, "val/accuracy": None}
    assert board_scalars(tmp_path, "train/loss") == [(1, 0.5)]
    assert board_scalars(tmp_path, "val/miou") == [(2, 0.25)]
    events = read_board(tmp_path)
    assert events.Scalars("final/miou")[0].value == 0.5
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"seed" in content and b"mlp" in content and b"layers" not in content
    log.close()


def test_resuming_drops_rows_written_after_the_checkpoint(tmp_path, monkeypatch):
    # files of one second and process differ by a number without leading zeros alone: the tenth would be read first
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    with RunLog(tmp_path, BOARD) as log:
        for step in range(0, 10):
            log.scalars(step, {"train/loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 10, "train/lo')
    with RunLog(tmp_path, BOARD, start_step=6) as log:
        assert [row["step"] for row in read_rows(path)] == list(range(7))
        for step in range(7, 12):
            log.scalars(step, {"train/loss": 100.0 + step})
    rows = read_rows(path)
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["train/loss"] for row in rows] == [*range(7), *range(107, 112)]
    seen = dict(board_scalars(tmp_path, "train/loss"))
    assert seen == {row["step"]: row["train/loss"] for row in rows}
    assert sorted(item.name for item in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("pending", [True, False])
def test_a_validation_that_is_made_again_is_logged_once(tmp_path, pending):
    with RunLog(tmp_path) as log:
        for step in (3, 6):
            log.scalars(step, {"train/loss": 1.0})
            log.scalars(step, {"val/miou": 0.5})
    RunLog(tmp_path, start_step=6, validation_pending=pending).close()
    rows = [(row["step"], "val/miou" in row) for row in read_rows(tmp_path / "metrics.jsonl")]
    assert rows == [(3, False), (3, True), (6, False), (6, True)][: 3 if pending else 4]


@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 3, "a": 1', b"\x00\x00\x00", b"tru", b'{"step": 3, "\xc3'])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n{"step": 2}\n' + torn)
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    RunLog(tmp_path, start_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    assert_refused(lambda: read_rows(path), "Line 2 of ", "metrics.jsonl", " is not JSON", "Repair or remove")
    assert "nonsense" in path.read_text()


def test_only_the_first_rank_writes(tmp_path):
    use_all(RunLog(tmp_path / "run", visible=False))
    assert not (tmp_path / "run").exists()


IMAGES = {"a": np.zeros((1, 1, 3), np.uint8)}


def use_all(log):
    log.config({"seed": 0})
    log.scalars(4, {"train/loss": 0.5, "val/loss": float("nan"), "val/miou": None})
    log.images(4, IMAGES)
    log.scores({"miou": 0.25})
    log.close()


METHODS = ("open", "config", "scalars", "images", "scores", "close")


def test_a_logger_receives_everything_and_only_finite_values(tmp_path):
    calls = []
    log = RunLog(tmp_path, {"mine": partial(RecordingLogger, calls=calls)}, start_step=3)
    use_all(log)
    given = [(tmp_path, 3), ({"seed": 0},), (4, {"train/loss": 0.5}), (4, IMAGES), ({"miou": 0.25},), ("finished",)]
    assert calls == [(method, *each) for method, each in zip(METHODS, given, strict=True)]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError(), "failed"),
        (SystemExit(1), "failed"),
        (KeyboardInterrupt(), "killed"),
        (Interrupted(signal.SIGTERM), "killed"),
    ],
)
def test_loggers_receive_how_the_training_ended(tmp_path, error, status):
    calls = []
    with pytest.raises(type(error)), RunLog(tmp_path, {"mine": partial(RecordingLogger, calls=calls)}):
        raise error
    with RunLog(tmp_path, {"mine": partial(RecordingLogger, calls=calls)}) as log:
        log.close()
    assert [call for call in calls if call[0] == "close"] == [("close", status), ("close", "finished")]


def test_loggers_are_closed_as_failed_if_another_is_refused(tmp_path):
    def refuse(out_dir, *, start_step):
        raise UserError("refused")

    calls = []
    loggers = {"mine": partial(RecordingLogger, calls=calls), "other": refuse}
    assert_refused(lambda: RunLog(tmp_path, loggers), "refused")
    assert calls[-1] == ("close", "failed")


@pytest.mark.parametrize("fails_in", METHODS)
def test_failing_logger_is_dropped_with_one_warning(tmp_path, caplog, fails_in):
    failed, other = [], []
    loggers = {
        "mine": partial(RecordingLogger, calls=failed, fails_in=fails_in),
        "other": partial(RecordingLogger, calls=other),
    }
    use_all(RunLog(tmp_path, loggers))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert (
        "logger.mine failed and is dropped (OSError: no connection to http://host/api). The training continues"
        in warning
    )
    closed = [] if fails_in in ("open", "close") else [("close", "failed")]
    count = METHODS.index(fails_in) + 1
    assert [method for method, *_ in failed[:count]] == [*METHODS[:count]] and failed[count:] == closed
    assert [method for method, *_ in other] == [*METHODS] and len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_images_are_files_by_step_and_resuming_drops_later_ones(tmp_path):
    with RunLog(tmp_path) as log:
        for step in (500, 1000):
            log.images(step, {"a": np.full((1, 2, 3), step % 251, np.uint8), "b/c": np.zeros((1, 2, 3), np.uint8)})
    assert sorted(item.name for item in tmp_path.iterdir()) == ["metrics.jsonl", "validation"]
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    steps = [f"validation/step_{step}" for step in ("00500", "01000")]
    assert files == [f"{step}/{name}.png" for step in steps for name in ("a", "b/c")]
    assert (read_image(tmp_path / files[0]) == 500 % 251).all()
    (tmp_path / "validation/notes").mkdir()
    RunLog(tmp_path, start_step=500).close()
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == ["notes", "step_00500"]
