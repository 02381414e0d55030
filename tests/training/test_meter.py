"""What the log says of a training as it goes: time left, speed, scores of its own batches; and its time limit."""

import logging
import math
import sys
from contextlib import closing
from mmap import PAGESIZE, mmap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mistakes import assert_refused

from dinoseg.core.shapes import Batch, Prediction
from dinoseg.metrics.confusion import ConfusionMatrix
from dinoseg.training.engine import Engine
from dinoseg.training.meter import Meter, peak_memory, reset_peak_memory
from dinoseg.training.step import StepScores, _centres, _subsample
from dinoseg.training.time_limit import TimeLimit

CPU = torch.device("cpu")
ENGINE = Engine("cpu", "fp32", workers=0)


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


class Run:
    """A training by a clock, with four images a step."""

    def __init__(self, done=0, steps=100, terminal=False, visible=True, minutes=None):
        self.now = 100.0
        limit = minutes and TimeLimit(minutes, None, clock=lambda: self.now)
        self.meter = Meter(done, steps, 25, 8.0, CPU, visible, limit=limit, clock=lambda: self.now, terminal=terminal)
        self.close, self.left, self.read = self.meter.close, self.meter.left, self.meter.read

    def train(self, steps, seconds=1.0, waited=0.25, first=1):
        """Take steps, of which the first takes `first` times as long."""

        def batches():
            while True:
                self.now += waited
                yield None

        stream = self.meter.measure_waits(batches(), lambda: "Read less.")
        for number in range(steps):
            next(stream)
            self.now += (seconds - waited) * (1 if number else first)
            self.meter.step(4, 0.5, 1e-4)

    def validate(self, seconds):
        with self.meter.measure_validation():
            self.now += seconds


def test_time_left_holds_the_validations():
    with closing(Run()) as run:
        run.train(20, first=10)
        assert run.left() == "01:20 and 4 validations left"
        run.train(5)
        run.validate(30)
        assert run.left() == "02:45 left"  # 75 steps and three times half a minute
    with closing(Run(done=25, steps=60)) as run:
        run.train(11, first=10)
        assert run.left() == "00:24 and 2 validations left"  # at steps 50 and 60
        run.train(24)
        assert run.left() == "00:00 left"


def test_time_left_respects_the_time_limit():
    with closing(Run(minutes=1.0)) as run:
        run.train(20)
        assert run.left() == "00:40 left"  # 80 steps and 4 validations do not fit
        run.train(45)
        assert run.left() == "00:00 left"
    with closing(Run(minutes=9.0)) as run:
        run.train(20)
        assert run.left() == "01:20 and 4 validations left"


def test_time_left_follows_the_newest_steps():
    """Those of a backbone that was frozen before take longer."""
    with closing(Run()) as run:
        run.train(20, first=10)
        run.train(40, seconds=3.0)
        assert run.left() == "02:00 and 2 validations left"


def test_a_pipe_gets_a_line_every_ten_seconds(caplog, capsys):
    with caplog.at_level(logging.INFO), closing(Run()) as run:
        run.train(41)
        run.validate(5)
        run.train(20)
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert len(lines) == 6 and capsys.readouterr().err == ""
    first, last = lines[0], lines[-1]
    assert first.startswith("step 10 of 100: epoch 1.2, loss 0.5000, rate 1.0e-04, ") and "validations left" in first
    assert all("4.0 images/s, waiting for data 25%, memory " in line for line in lines)  # without the validation
    assert last.endswith(" left")


def test_slow_rates_are_logged_with_significant_digits(caplog):
    with caplog.at_level(logging.INFO), closing(Run()) as run:
        run.train(3, seconds=100.0, waited=0.0)
        run.read()
    assert caplog.messages and all("0.04 images/s" in line for line in caplog.messages)


@pytest.mark.parametrize(("terminal", "visible"), [(True, True), (True, False), (False, False)])
def test_a_terminal_gets_a_bar_and_other_ranks_nothing(caplog, capsys, terminal, visible):
    with caplog.at_level(logging.INFO), closing(Run(terminal=terminal, visible=visible)) as run:
        run.train(100)
    shown = capsys.readouterr().err
    assert not any(line.startswith("step ") for line in caplog.messages) and bool(shown) == visible
    if visible:
        assert "100/100" in shown and "epoch 12.5, loss 0.5000, rate 1.0e-04, 4.0 images/s" in shown


def test_rows_measure_time_since_the_last_row_without_validation():
    with closing(Run()) as run:
        run.train(5)
        run.read()
        run.train(2, waited=0.5)
        run.validate(60)
        run.train(2, seconds=0.5)
        row = run.read()
    assert row["train/images_per_s"] == pytest.approx(8) and row["train/data_wait"] == pytest.approx(0.5)


@pytest.mark.parametrize(("waited", "warned"), [(0.02, False), (0.25, True)])
def test_summary_has_the_waiting_share_and_a_remedy(caplog, waited, warned):
    with caplog.at_level(logging.INFO), closing(Run(terminal=True)) as run:
        for steps, first in ((11, 50), (10, 1), (10, 1)):
            run.train(steps, waited=waited, first=first)
            run.read()
            run.validate(300)
    assert caplog.messages[0] == f"trained 4.0 images/s (median), waiting for data {100 * waited:.1f}% of the time"
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == warned
    if warned:
        assert told == ["The training spent 25% of its time waiting for data. Read less."]


@pytest.mark.parametrize(("visible", "steps"), [(False, 90), (True, 1), (True, 0), (True, 9)])
def test_hidden_ranks_and_short_runs_have_no_summary(caplog, visible, steps):
    level = logging.WARNING if steps == 9 else logging.INFO  # nine steps are too short for a warning alone
    with caplog.at_level(level), closing(Run(terminal=True, visible=visible)) as run:
        run.train(steps)
    assert not caplog.records


DATA = SimpleNamespace(classes=("a", "b", "c"), ignore_index=255)


def prediction_and_batch(scores, mask):
    def to_pixels(outputs, size, valid):
        return torch.nn.functional.interpolate(outputs, size, mode="bilinear")

    batch = Batch(torch.zeros(len(mask), 3, *mask.shape[1:], dtype=torch.uint8), mask, ["x"] * len(mask))
    return Prediction(scores, tuple(mask.shape[1:]), (1.0, 1.0), to_pixels), batch


def test_small_images_are_counted_whole():
    draw = torch.Generator().manual_seed(0)
    step_scores = StepScores(DATA, ENGINE)
    whole = ConfusionMatrix(3)
    for _ in range(2):
        scores = torch.randn(2, 3, 19, 23, generator=draw, requires_grad=True)
        mask = torch.randint(0, 3, (2, 19, 23), generator=draw).to(torch.uint8)
        mask[:, :3] = 255
        step_scores.add(*prediction_and_batch(scores, mask))
        whole.update(scores.argmax(dim=1), mask)
    expected = whole.compute()
    assert step_scores.read() == {"train/accuracy": expected["accuracy"], "train/miou": expected["miou"]}


def test_large_images_are_counted_at_sampled_points():
    mask = torch.zeros(1, 540, 957, dtype=torch.uint8)
    mask[:, 200:, 300:] = 1
    scores = torch.nn.functional.one_hot(mask.long(), 3).permute(0, 3, 1, 2).float()
    step_scores = StepScores(DATA, ENGINE)
    step_scores.add(*prediction_and_batch(scores, mask))
    counted = step_scores._counts.compute()
    assert 0.9 * 128**2 < counted["pixels"] <= 1.03 * 128**2
    share = counted["classes"][1]["pixels"] / counted["pixels"]
    assert counted["accuracy"] > 0.995 and np.isclose(share, mask.float().mean(), atol=0.01)
    assert _subsample(mask).shape == (1, 97, 171)
    assert _centres(10, 5, torch.device("cpu")).tolist() == [1, 3, 5, 7, 9]


def test_step_scores_skip_ignored_pixels_and_refuse_unknown_ids():
    step_scores = StepScores(DATA, ENGINE)
    scores = torch.zeros(1, 3, 4, 4)
    step_scores.add(*prediction_and_batch(scores, torch.full((1, 4, 4), 255, dtype=torch.uint8)))
    assert step_scores.read() == {"train/accuracy": None, "train/miou": None}
    unknown = prediction_and_batch(scores, torch.full((1, 4, 4), 7, dtype=torch.uint8))
    assert_refused(lambda: step_scores.add(*unknown), "found: [7]")


def test_step_scores_sums_over_ranks_and_omits_the_ignored_id():
    other = SimpleNamespace(classes=DATA.classes, ignore_index=2)
    wrong = ConfusionMatrix(3, ignore_index=2)
    wrong.update(torch.ones(1, 1, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, dtype=torch.uint8))
    step_scores = StepScores(other, SimpleNamespace(device="cpu", sum=lambda counts: counts + wrong.counts))
    mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
    mask[:, 2:] = 2
    scores = torch.zeros(1, 3, 4, 4)
    scores[:, 0] = 1
    step_scores.add(*prediction_and_batch(scores, mask))
    assert step_scores.read() == {"train/accuracy": 0.5, "train/miou": 0.25}


def run_limited(step, *, planned=100, val_every=50, validation=2.0, start=0.0, begin=0.0):
    """Run a loop of a minute by a fake clock: `step(number)` and `validation` take so many seconds.

    Return the seconds, and what was done: (number of steps, steps that fit) or "validated".
    """
    clock = SimpleNamespace(now=100.0)
    limit = TimeLimit(1.0, ENGINE, frozen_until=begin, clock=lambda: clock.now)
    done = []
    clock.now += start
    for number in range(planned):
        steps = limit.fit_steps(number, planned)
        if number >= steps:
            break
        clock.now += step(number) if number >= math.ceil(begin * steps) else step(number) / 2  # frozen: faster
        done.append((number + 1, steps))
        if (number + 1) % val_every == 0 or number + 1 == steps:
            with limit.measure_validation():
                clock.now += validation
            done.append("validated")
    return clock.now - 100, done


def lengths_of(done):
    """Return how many steps fit, as known at each step."""
    return [each[1] for each in done if each != "validated"]


def test_a_training_that_keeps_up_is_not_changed():
    seconds, done = run_limited(lambda number: 0.5)
    assert seconds == 54 and done[-2:] == [(100, 100), "validated"] and len(done) == 102
    # a long validation is no part of a step
    _, done = run_limited(lambda number: 0.4, val_every=80, validation=8.0)
    assert done[-2:] == [(100, 100), "validated"]


@pytest.mark.parametrize(
    "step",
    [
        lambda number: 1.0,
        lambda number: 0.5 if number < 60 else 3.0,  # the machine becomes busy late
        lambda number: 3.0 if number < 12 else 0.2,  # cached features: the first steps are the slow ones
        lambda number: 1.0 if number < 49 else 0.1,  # too late: the number of steps never rises
    ],
)
def test_slow_training_ends_validated_within_its_limit(step):
    seconds, done = run_limited(step)
    assert 50 < seconds <= 62 and done[-1] == "validated", done
    lengths = lengths_of(done)
    assert lengths[0] == 100 and done[-2][0] == done[-2][1] and lengths == sorted(lengths, reverse=True)


def test_late_training_ends_with_exactly_one_validation(caplog):
    with caplog.at_level(logging.WARNING):
        seconds, done = run_limited(lambda number: 70.0)
    assert done == [(1, 100), (2, 2), "validated"] and seconds == 142
    (message,) = caplog.messages
    assert message.startswith("The time limit is too short for all steps: about 2 instead of 100 fit into")
    seconds, done = run_limited(lambda number: 1.0, val_every=57, validation=4.0)
    assert seconds == 61 and done[-2:] == [(57, 60), "validated"]


def test_start_time_does_not_count_as_step_duration():
    seconds, done = run_limited(lambda number: 5.0, planned=20, validation=0.0, start=0.001)
    assert done[-2:] == [(11, 11), "validated"] and seconds == pytest.approx(55.001)


@pytest.mark.parametrize("busy", [0, 60])  # all steps take three times as long, or those after the freeze alone
def test_a_late_training_still_trains_the_backbone_for_its_share(busy):
    seconds, done = run_limited(lambda number: 3.0 if number >= busy else 1.0, begin=0.4, val_every=100)
    lengths = lengths_of(done)
    begins = [math.ceil(0.4 * steps) for steps in lengths]
    first = next(number for number, begin in enumerate(begins) if number >= begin)
    assert first == begins[first] and len(lengths) - first >= 12 and 50 < seconds <= 65
    assert all(number >= begin for number, begin in list(enumerate(begins))[first:])
