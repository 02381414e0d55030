"""Loggers in a thread: nothing waits for them, and failures reach the training once."""

import itertools
import threading
import time

import numpy as np
import pytest

from dinoseg.report.log import RunLog
from dinoseg.report.loggers import logger
from dinoseg.report.loggers.logger import Logger


class RecordingLogger(Logger):
    """Records calls; may wait in one of them for a gate that is closed, or raise an error in it."""

    error = OSError

    def __init__(self, out_dir=None, *, start_step=0, timeout=None, waits_in="", fails_in="", calls=None):
        self.timeout, self.waits_in, self.fails_in = timeout, waits_in, fails_in
        self.calls, self.gate = [] if calls is None else calls, threading.Event()
        self.note("open", out_dir, start_step)

    def __getattribute__(self, name):
        if name in ("config", "scalars", "images", "scores", "checkpoint", "close"):
            return lambda *given, **named: self.note(name, *given, *named.values())
        return super().__getattribute__(name)

    def note(self, name, *given):
        self.calls.append((name, *given))
        self.view = f"seen by {threading.current_thread().name}"
        if name == self.waits_in:
            self.gate.wait()
        if name == self.fails_in:
            raise self.error("no connection to http://me:secret@host/api")

    @property
    def methods(self):
        """Return the names of the methods that were called after the constructor."""
        return [name for name, *_ in self.calls[1:]]


def slow_logger(waits_in="", fails_in=""):
    """Return a logger that runs in a thread, with little time to wait in."""
    return RecordingLogger(timeout=0.2 if waits_in else 600.0, waits_in=waits_in, fails_in=fails_in)


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(logger, "_GRACE", 0.0)


def wait_for_thread():
    for each in threading.enumerate():
        if each.name == "dinoseg RecordingLogger":
            each.join(60)


def start_log(folder, slow):
    return RunLog(folder, {"slow": lambda *_, **__: slow})


def use(log, path):
    log.config({"seed": 0})
    log.scalars(1, {"a": 1.0})
    log.images(1, {"b": np.zeros((1, 1, 3), np.uint8)})
    log.scores({"miou": 0.5})
    log.checkpoint(path)


def test_all_calls_arrive_in_order_in_another_thread(tmp_path):
    slow = slow_logger()
    with pytest.raises(KeyboardInterrupt), start_log(tmp_path, slow) as log:
        use(log, tmp_path)
        raise KeyboardInterrupt
    assert slow.methods == ["config", "scalars", "images", "scores", "checkpoint", "close"]
    assert slow.calls[-1] == ("close", "killed") and log.views == ["seen by dinoseg RecordingLogger"]
    assert not [each for each in threading.enumerate() if each.name == "dinoseg RecordingLogger"]


@pytest.mark.parametrize(("where", "status"), [("config", "failed"), ("scalars", "failed"), ("close", "finished")])
def test_hanging_logger_is_dropped_in_bounded_time(tmp_path, caplog, where, status):
    slow = slow_logger(waits_in=where)
    log = start_log(tmp_path, slow)
    use(log, tmp_path)
    log.close()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "logger.slow failed and is dropped (TimeoutError: " in warning and "The training continues" in warning
    slow.gate.set()
    wait_for_thread()
    assert slow.calls[-1] == ("close", status)


def test_wait_for_the_last_values_is_logged(tmp_path, monkeypatch, caplog):
    slow = slow_logger(waits_in="close")
    monkeypatch.setattr("dinoseg.report.loggers.logger.NOTICE", 0)
    start_log(tmp_path, slow).close()
    slow.gate.set()
    assert "Waiting for RecordingLogger to send the last values" in caplog.text


def test_a_stalled_logger_is_dropped_in_mid_training(tmp_path, caplog):
    slow = slow_logger(waits_in="config")
    with start_log(tmp_path, slow) as log:
        log.config({})
        for step in itertools.count():
            log.scalars(step, {"a": 1.0})
            if "TimeoutError: no answer for 0.2 s" in caplog.text:
                break
            time.sleep(0.05)
        log.scalars(step + 1, {"a": 1.0})
    assert len(caplog.records) == 1 and slow.methods == ["config"]
    slow.gate.set()


@pytest.mark.parametrize(
    ("where", "error"), [("config", OSError), ("checkpoint", OSError), ("close", OSError), ("images", SystemExit)]
)
def test_an_exception_is_one_warning_without_credentials(tmp_path, caplog, where, error):
    slow = slow_logger(fails_in=where)
    slow.error = error
    with start_log(tmp_path, slow) as log:
        use(log, tmp_path)
    (warning,) = [record.getMessage() for record in caplog.records]
    shown = "(RuntimeError: SystemExit: no connection" if error is SystemExit else "(OSError: no connection"
    assert f"{shown} to http://host/api)" in warning
    wait_for_thread()
    assert slow.methods[-2:] == ([where, "close"] if where != "close" else ["checkpoint", "close"])
    assert slow.calls[-1] == ("close", "finished" if where == "close" else "failed")
