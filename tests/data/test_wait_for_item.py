"""A loading process that gives nothing for long is told of, once and then rarely."""

import time
from types import SimpleNamespace

import pytest

from dinoseg.data import loader
from dinoseg.data.loader import load_in_order
from dinoseg.utils.errors import UserError


class Slow:
    """An iterator that comes to nothing for so many polls, before each of its items."""

    _workers = (SimpleNamespace(pid=77), SimpleNamespace(pid=88))

    def __init__(self, polls, error="DataLoader timed out after 5.0 seconds"):
        self.polls, self.left, self.error = polls, polls, error

    def __next__(self):
        if not self.left:
            self.left = self.polls
            return "item"
        self.left -= 1
        raise RuntimeError(self.error)


def test_missing_batch_is_reported_at_growing_intervals(monkeypatch, caplog):
    seconds = iter(range(0, 10_000, 5))
    monkeypatch.setattr(loader, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    assert loader.wait_for_item(Slow(11), 0, 2) == "item" and not caplog.messages
    assert loader.wait_for_item(Slow(400), 6, 2) == "item"
    assert [message.split(":")[0] for message in caplog.messages] == [
        *("No batch for 60 s", "No batch for 300 s", "No batch for 1500 s")
    ]
    assert "item 7 of this epoch is due from loading process 1 of 2 (id 77)" in caplog.text
    assert "py-spy dump --pid 77" in caplog.text and "engine.workers=0" in caplog.text


@pytest.mark.parametrize("words", ["(pid 7) is killed by signal: Killed.", "(pid(s) 7) exited unexpectedly"])
def test_killed_process_is_reported_with_its_remedy(words):
    with pytest.raises(UserError, match=r"because memory ran out.* 7.*engine\.workers=1.*resume=auto"):
        loader.wait_for_item(Slow(1, f"DataLoader worker {words}"), 0, 2)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="another"):
        loader.wait_for_item(Slow(1, "another"), 0, 2)


def test_a_pinning_thread_that_has_ended_is_not_waited_for():
    slow = Slow(10**9)
    slow._pin_memory_thread = SimpleNamespace(is_alive=lambda: False)
    with pytest.raises(UserError, match="the thread that pins batches has stopped"):
        loader.wait_for_item(slow, 0, 2)


def test_late_batch_is_still_returned(monkeypatch, caplog, tmp_path):
    def read(key):
        while key == 2 and not (tmp_path / "told").exists():
            time.sleep(0.01)
        return key

    def release(record):
        if "item 3 " in record.getMessage():
            (tmp_path / "told").touch()
        return True

    monkeypatch.setattr(loader, "POLL", 0.02)
    monkeypatch.setattr(loader, "_PATIENCE", 0.05)
    monkeypatch.setattr(loader.log, "filters", [release])
    assert list(load_in_order(read, range(4), 2)) == [0, 1, 2, 3]
    assert "item 3 of this epoch is due from loading process 1 of 2" in caplog.text
