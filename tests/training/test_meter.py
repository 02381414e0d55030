import logging
import sys
from contextlib import closing
from mmap import PAGESIZE, mmap

import pytest
import torch

from dinoseg.training.meter import Meter, peak_memory, reset_peak_memory
from dinoseg.training.time_limit import TimeLimit

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset a process's peak")
def test_peak_memory_counts_from_the_last_reset():
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    with mmap(-1, 300 * 2**20) as block:  # new pages: an allocator may have as many at hand
        for start in range(0, len(block), PAGESIZE):
            block[start] = 1
        high = peak_memory(CPU)
    assert high > before + 250 * 2**20
    assert peak_memory(CPU) > high - 2**20
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < high - 250 * 2**20


class Clock:
    """Seconds that pass only when told to."""

    now = 100.0

    def __call__(self):
        return self.now


def meter(clock, done=0, steps=100, terminal=False, visible=True, limit=None):
    return Meter(done, steps, 25, 8.0, CPU, visible, limit=limit, clock=clock, terminal=terminal)


def train(running, clock, steps, seconds=1.0, waited=0.25, first=1):
    """Take steps of four images, of which the first takes `first` times as long."""

    def batches():
        while True:
            clock.now += waited
            yield None

    stream = running.measure_waits(batches(), lambda: "Read less.")
    for number in range(steps):
        next(stream)
        clock.now += (seconds - waited) * (1 if number else first)
        running.step(4, 0.5, 1e-4)


def validate(running, clock, seconds):
    with running.measure_validation():
        clock.now += seconds


def test_time_left_holds_the_validations():
    clock = Clock()
    with closing(meter(clock)) as running:
        train(running, clock, 20, first=10)
        assert running.left() == "01:20 and 4 validations left"
        train(running, clock, 5)
        validate(running, clock, 30)
        assert running.left() == "02:45 left"  # 75 steps and three times half a minute
    with closing(meter(clock, done=25, steps=60)) as running:
        train(running, clock, 11, first=10)
        assert running.left() == "00:24 and 2 validations left"  # at steps 50 and 60
        train(running, clock, 24)
        assert running.left() == "00:00 left"


def test_time_left_respects_the_time_limit():
    clock = Clock()
    limit = TimeLimit(1.0, None, clock=clock)
    with closing(meter(clock, limit=limit)) as running:
        train(running, clock, 20)
        assert running.left() == "00:40 left"  # 80 steps and 4 validations do not fit
        train(running, clock, 45)
        assert running.left() == "00:00 left"
    with closing(meter(clock, limit=TimeLimit(9.0, None, clock=clock))) as running:
        train(running, clock, 20)
        assert running.left() == "01:20 and 4 validations left"


def test_time_left_follows_the_newest_steps():
    """Those of a backbone that was frozen before take longer."""
    clock = Clock()
    with closing(meter(clock, steps=100)) as running:
        train(running, clock, 20, first=10)
        assert running.left() == "01:20 and 4 validations left"
        train(running, clock, 40, seconds=3.0)
        assert running.left() == "02:00 and 2 validations left"


def test_a_pipe_gets_a_line_every_ten_seconds(caplog, capsys):
    clock = Clock()
    with caplog.at_level(logging.INFO), closing(meter(clock)) as running:
        train(running, clock, 41)
        validate(running, clock, 5)
        train(running, clock, 20)
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert len(lines) == 6 and capsys.readouterr().err == ""
    first, last = lines[0], lines[-1]
    assert first.startswith("step 10 of 100: epoch 1.2, loss 0.5000, rate 1.0e-04, ") and "validations left" in first
    assert all("4.0 images/s, waiting for data 25%, memory " in line for line in lines)  # without the validation
    assert last.endswith(" left")


def test_slow_rates_are_logged_with_significant_digits(caplog):
    clock = Clock()
    with caplog.at_level(logging.INFO), closing(meter(clock)) as running:
        train(running, clock, 3, seconds=100.0, waited=0.0)
        running.read()
    assert caplog.messages and all("0.04 images/s" in line for line in caplog.messages)


@pytest.mark.parametrize(("terminal", "visible"), [(True, True), (True, False), (False, False)])
def test_a_terminal_gets_a_bar_and_other_ranks_nothing(caplog, capsys, terminal, visible):
    clock = Clock()
    with caplog.at_level(logging.INFO), closing(meter(clock, terminal=terminal, visible=visible)) as running:
        train(running, clock, 100)
    shown = capsys.readouterr().err
    assert not any(line.startswith("step ") for line in caplog.messages) and bool(shown) == visible
    if visible:
        assert "100/100" in shown and "epoch 12.5, loss 0.5000, rate 1.0e-04, 4.0 images/s" in shown


def test_rows_measure_time_since_the_last_row_without_validation():
    clock = Clock()
    with closing(meter(clock)) as running:
        train(running, clock, 5)
        running.read()
        train(running, clock, 2, waited=0.5)
        validate(running, clock, 60)
        train(running, clock, 2, seconds=0.5)
        row = running.read()
    assert row["train/images_per_s"] == pytest.approx(8) and row["train/data_wait"] == pytest.approx(0.5)


@pytest.mark.parametrize(("waited", "warned"), [(0.02, False), (0.25, True)])
def test_summary_has_the_waiting_share_and_a_remedy(caplog, waited, warned):
    clock = Clock()
    with caplog.at_level(logging.INFO), closing(meter(clock, terminal=True)) as running:
        for steps, first in ((11, 50), (10, 1), (10, 1)):
            train(running, clock, steps, waited=waited, first=first)
            running.read()
            validate(running, clock, 300)
    assert caplog.messages[0] == f"trained 4.0 images/s (median), waiting for data {100 * waited:.1f}% of the time"
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == warned
    if warned:
        assert told == ["The training spent 25% of its time waiting for data. Read less."]


def test_hidden_ranks_and_short_runs_have_no_summary(caplog):
    for visible, steps in ((False, 90), (True, 1), (True, 0)):
        clock = Clock()
        with caplog.at_level(logging.INFO), closing(meter(clock, terminal=True, visible=visible)) as running:
            train(running, clock, steps)
    assert not caplog.records
    clock = Clock()
    with caplog.at_level(logging.WARNING), closing(meter(clock, terminal=True)) as running:
        train(running, clock, 9)  # too short to tell
    assert not caplog.records
