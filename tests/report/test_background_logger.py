"""Loggers in a thread: nothing waits for them, and failures reach the training once."""

import itertools
import threading
import time

import numpy as np
import pytest

from dinoseg.report.log import RunLog
from dinoseg.report.loggers import background
from dinoseg.report.loggers.background import BackgroundLogger
from dinoseg.report.loggers.logger import Logger


class SlowLogger(Logger):
    """Records calls, and waits in one of them for a gate that is closed or for ever."""

    error = OSError

    def __init__(self, out_dir=None, *, start_step=0, waits_in="", fails_in=""):
        self.timeout = 0.2 if waits_in else 600.0
        self.calls, self.gate, self.waits_in, self.fails_in = [], threading.Event(), waits_in, fails_in

    def __getattribute__(self, name):
        if name in ("config", "scalars", "images", "scores", "checkpoint", "close"):
            return lambda *given, **named: self.note(name, *given, **named)
        return super().__getattribute__(name)

    def note(self, name, *given, status=None):
        self.calls.append(name)
        self.status = status
        self.view = f"seen by {threading.current_thread().name}"
        if name == self.waits_in:
            self.gate.wait()
        if name == self.fails_in:
            raise self.error("no connection to http://me:secret@host/api")


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(background, "_GRACE", 0.0)


def wait_for_thread():
    for each in threading.enumerate():
        if each.name == "dinoseg SlowLogger":
            each.join(60)


def use(log, path):
    log.config({"seed": 0})
    log.scalars(1, {"a": 1.0})
    log.images(1, {"b": np.zeros((1, 1, 3), np.uint8)})
    log.scores({"miou": 0.5})
    log.checkpoint(path)


def test_all_calls_arrive_in_order_in_another_thread(tmp_path):
    slow = SlowLogger()
    log = RunLog(tmp_path, {"slow": lambda *_, **__: slow})
    use(log, tmp_path)
    log.close()
    assert slow.calls == ["config", "scalars", "images", "scores", "checkpoint", "close"]
    assert slow.view == "seen by dinoseg SlowLogger"
    assert not [each for each in threading.enumerate() if each.name == "dinoseg SlowLogger"]


def test_the_view_is_that_of_the_logger():
    wrapped = BackgroundLogger(SlowLogger())
    wrapped.config({})
    wrapped.close()
    assert wrapped.view == "seen by dinoseg SlowLogger"


@pytest.mark.parametrize("status", ["finished", "failed", "killed"])
def test_the_end_of_a_training_reaches_the_logger(status):
    slow = SlowLogger()
    BackgroundLogger(slow).close(status=status)
    assert slow.status == status


@pytest.mark.parametrize("where", ["config", "scalars", "close"])
def test_hanging_logger_is_dropped_in_bounded_time(tmp_path, caplog, where):
    slow = SlowLogger(waits_in=where)
    log = RunLog(tmp_path, {"slow": lambda *_, **__: slow})
    use(log, tmp_path)
    log.close()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "logger.slow failed and is dropped (TimeoutError: " in warning and "The training continues" in warning
    slow.gate.set()


def test_a_stalled_logger_is_dropped_in_mid_training(tmp_path, caplog):
    slow = SlowLogger(waits_in="config")
    with RunLog(tmp_path, {"slow": lambda *_, **__: slow}) as log:
        log.config({})
        for step in itertools.count():
            log.scalars(step, {"a": 1.0})
            if "TimeoutError: no answer for 0.2 s" in caplog.text:
                break
            time.sleep(0.05)
        log.scalars(step + 1, {"a": 1.0})
    assert len(caplog.records) == 1 and slow.calls == ["config"]
    slow.gate.set()


def test_a_logger_slower_than_the_training_is_dropped(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(background, "_MAX_CALLS", 3)
    slow = SlowLogger(waits_in="config")
    slow.timeout = 60
    with RunLog(tmp_path, {"slow": lambda *_, **__: slow}) as log:
        log.config({})
        for step in range(9):
            log.scalars(step, {"a": 1.0})
    assert len(caplog.records) == 1 and "3 calls wait: it is slower than the training" in caplog.text
    slow.gate.set()


@pytest.mark.parametrize("where", ["config", "images", "checkpoint", "close"])
def test_an_exception_is_one_warning_without_credentials(tmp_path, caplog, where):
    slow = SlowLogger(fails_in=where)
    with RunLog(tmp_path, {"slow": lambda *_, **__: slow}) as log:
        use(log, tmp_path)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "(OSError: no connection to http://host/api)" in warning
    wait_for_thread()
    assert slow.calls[-2:] == ([where, "close"] if where != "close" else ["checkpoint", "close"])
    assert slow.status == ("finished" if where == "close" else "failed")


def test_an_exit_of_a_client_is_a_warning_and_ends_no_training(tmp_path, caplog):
    slow = SlowLogger(fails_in="config")
    slow.error = SystemExit
    with RunLog(tmp_path, {"slow": lambda *_, **__: slow}) as log:
        use(log, tmp_path)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "(RuntimeError: SystemExit: no connection" in warning
    wait_for_thread()
    assert slow.calls == ["config", "close"] and slow.status == "failed"


def test_a_stalled_logger_is_closed_when_its_call_returns(tmp_path):
    slow = SlowLogger(waits_in="config")
    with RunLog(tmp_path, {"slow": lambda *_, **__: slow}) as log:
        log.config({})
    slow.gate.set()
    wait_for_thread()
    assert slow.calls == ["config", "close"] and slow.status == "failed"
