import json

import numpy as np
import pytest

from dinoseg.errors import UserError
from dinoseg.report.log import RunLog, read_rows


def board_scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_rows_are_readable_at_once_and_reach_tensorboard(tmp_path):
    with RunLog(tmp_path) as log:
        log.scalars(1, {"train/loss": np.float32(0.5), "train/lr": 1e-4})
        assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 0.5, "train/lr": 1e-4}]
        log.scalars(2, {"val/miou": 0.25, "val/loss": float("nan"), "val/accuracy": None})
        log.picture(2, "val/prediction", np.zeros((4, 6, 3), np.uint8))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 2, "val/miou": 0.25, "val/loss": None, "val/accuracy": None}
    assert board_scalars(tmp_path, "train/loss") == [(1, 0.5)]
    assert board_scalars(tmp_path, "val/miou") == [(2, 0.25)]
    log.close()


def test_going_on_drops_what_a_killed_run_wrote_beyond(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(0, 10):
            log.scalars(step, {"train/loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 10, "train/lo')
    with RunLog(tmp_path, start_step=6) as log:
        assert [row["step"] for row in read_rows(path)] == list(range(7))
        for step in range(7, 12):
            log.scalars(step, {"train/loss": 100.0 + step})
    rows = read_rows(path)
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["train/loss"] for row in rows] == [*range(7), *range(107, 112)]
    seen = dict(board_scalars(tmp_path, "train/loss"))
    assert seen == {row["step"]: row["train/loss"] for row in rows}
    assert sorted(item.name for item in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("torn", ["", "{", '{"step": 3', '{"step": 3, "a": 1', "\x00\x00\x00", "tru", "5"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n' + torn)
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    RunLog(tmp_path, start_step=2, tensorboard=False).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_file_torn_inside_a_letter_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "\xc3')
    assert read_rows(path) == [{"step": 1}]


@pytest.mark.parametrize("bad", ["nonsense", '{"loss": 1}', "[1]", '{"step": null}'])
def test_damage_elsewhere_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl.*Repair or remove"):
        read_rows(path)
    assert bad in path.read_text()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*metrics\.jsonl"):
        read_rows(tmp_path / "metrics.jsonl")


def test_only_the_first_rank_writes(tmp_path):
    log = RunLog(tmp_path / "run", visible=False)
    log.scalars(1, {"a": 1.0})
    log.picture(1, "a", np.zeros((1, 1, 3), np.uint8))
    log.close()
    assert not (tmp_path / "run").exists()


def test_without_tensorboard_no_folder_is_made(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.picture(1, "a", np.zeros((1, 1, 3), np.uint8))
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]
