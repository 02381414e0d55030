import logging
import math

import pytest

from dinoseg.training.engine import Engine
from dinoseg.training.time_limit import TimeLimit


@pytest.fixture
def run_limited():
    """Run a loop by a fake clock: `step(number)` and `validation` take so many seconds; return what was done when."""

    def run(step, *, minutes=1.0, steps=100, val_every=50, validation=2.0, start=0.0, begin=0.0):
        now = [100.0]
        limit = TimeLimit(minutes, Engine("cpu", "fp32"), frozen_until=begin, clock=lambda: now[0])
        planned, done = steps, []
        now[0] += start
        for number in range(planned):
            if number >= (steps := limit.fit_steps(number, planned)):
                break
            now[0] += step(number) if number >= math.ceil(begin * steps) else step(number) / 2  # frozen: faster
            is_last = number + 1 == steps
            done.append((number + 1, steps))
            if (number + 1) % val_every == 0 or is_last:
                with limit.measure_validation():
                    now[0] += validation
                done.append("validated")
        return now[0] - 100, done

    return run


def test_a_training_that_keeps_up_is_not_changed(run_limited):
    seconds, done = run_limited(lambda number: 0.5)
    assert seconds == 54 and done[-2:] == [(100, 100), "validated"] and len(done) == 102


def test_a_long_validation_is_no_part_of_a_step(run_limited):
    _, done = run_limited(lambda number: 0.4, val_every=80, validation=8.0)
    assert done[-2:] == [(100, 100), "validated"]


@pytest.mark.parametrize(
    "step",
    [
        lambda number: 1.0,
        lambda number: 0.5 if number < 60 else 3.0,  # the machine becomes busy late
        lambda number: 3.0 if number < 12 else 0.2,  # cached features: the first steps are the slow ones
    ],
)
def test_slow_training_ends_validated_within_its_limit(run_limited, step):
    seconds, done = run_limited(step)
    assert 50 < seconds <= 62 and done[-1] == "validated", done
    lengths = [each[1] for each in done if each != "validated"]
    assert lengths[0] == 100 and done[-2][0] == done[-2][1]


def test_late_training_ends_with_exactly_one_validation(run_limited, caplog):
    with caplog.at_level(logging.WARNING):
        seconds, done = run_limited(lambda number: 70.0)
    assert done == [(1, 100), (2, 2), "validated"] and seconds == 142
    (message,) = caplog.messages
    assert message.startswith("The time limit is too short for all steps: about 2 instead of 100 fit into")
    seconds, done = run_limited(lambda number: 1.0, val_every=57, validation=4.0)
    assert seconds == 61 and done[-2:] == [(57, 60), "validated"]


def test_start_time_does_not_count_as_step_duration(run_limited):
    seconds, done = run_limited(lambda number: 5.0, steps=20, validation=0.0, start=0.001)
    assert done[-2:] == [(11, 11), "validated"] and seconds == pytest.approx(55.001)


@pytest.mark.parametrize("busy", [0, 60])  # all steps take three times as long, or those after the freeze alone
def test_a_late_training_still_trains_the_backbone_for_its_share(run_limited, busy):
    seconds, done = run_limited(lambda number: 3.0 if number >= busy else 1.0, begin=0.4, val_every=100)
    lengths = [each[1] for each in done if each != "validated"]
    begins = [math.ceil(0.4 * steps) for steps in lengths]
    first = next(number for number, begin in enumerate(begins) if number >= begin)
    assert first == begins[first] and len(lengths) - first >= 12 and 50 < seconds <= 65
    assert all(number >= begin for number, begin in list(enumerate(begins))[first:])


def test_the_number_of_steps_never_rises(run_limited):
    _, done = run_limited(lambda number: 1.0 if number < 49 else 0.1, minutes=1.0)
    lengths = [each[1] for each in done if each != "validated"]
    assert lengths[0] > lengths[-1] == len(lengths) and lengths == sorted(lengths, reverse=True)
