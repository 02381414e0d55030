"""What a signal does: in training it waits for a whole step, everywhere it says what is left of the work."""

import os
import signal
from functools import partial
from unittest.mock import Mock

import pytest
from command_line import SMALL, call, write_data
from signals import signal_in_thread

from dinoseg.cli import checkpoint_keys
from dinoseg.extensions.protocols import score_mode as score
from dinoseg.training import checkpoint
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.utils import interrupt
from dinoseg.utils.interrupt import Interrupted, block_signals, defer_signals, forward_signals, raise_on_signal


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.heavy), (signal.SIGTERM, 143)]
)
def test_signal_saves_the_current_step_and_reports_it(tmp_path, monkeypatch, number, status):
    whole = ImageDataModule.train_batches

    def batches(self, start):
        for index, batch in enumerate(whole(self, start), start=start):
            if index == 2:
                signal.raise_signal(number)
            yield batch

    write_data(tmp_path / "data")
    monkeypatch.setattr(ImageDataModule, "train_batches", batches)
    lengths = ("trainer.steps=9", "trainer.val_every=3")
    done = call(tmp_path, "mode=train", *SMALL, "mode.metrics_only=true", *lengths)
    last = next(tmp_path.glob("outputs/base/train_*/checkpoints/last.safetensors"))
    assert done.status == status and "Traceback" not in done.err
    assert f"interrupted: {last} holds step 3. To resume, add resume=auto or resume={last.parents[1]}" in done.err
    progress = checkpoint.describe(last)["progress"]
    assert progress["step"] == 3 and progress["validation_pending"] and not (last.parent / "best.safetensors").exists()
    assert not [path for path in last.parents[1].rglob(".*")]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "handlers are put back"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("name", "said"), [("none", "\n"), ("some", ": finished results are in ")])
def test_interrupted_modes_report_finished_results(tmp_path, monkeypatch, number, status, name, said):
    def stop(cfg, *, out_dir, **_):
        if name == "some":
            (out_dir / "some.png").touch()
        signal.raise_signal(number)

    monkeypatch.setattr(score, "run", stop)
    done = call(tmp_path, "mode=score", f"hydra.run.dir={name}")
    assert done.status == status and done.err.startswith(f"\ninterrupted{said}"), done.err


def test_a_command_that_is_stopped_before_it_begins_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_keys, "root_config", Mock(side_effect=KeyboardInterrupt))
    done = call(tmp_path, "mode=score")
    assert (done.status, done.err) == (130, "\ninterrupted\n")


def test_second_signal_ends_at_once_but_echoes_are_merged(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    with pytest.raises(Interrupted) as ended, defer_signals("wait") as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun passes on what the terminal has sent to all
        assert stop.signal == signal.SIGINT
        now[0] += 3
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.again and ended.value.status == 143


def test_deferred_signal_is_raised_last_and_hides_its_effects():
    with pytest.raises(Interrupted), defer_signals(""):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted), defer_signals(""):
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("DataLoader worker is killed by signal")
    with pytest.raises(ValueError, match="a file"), defer_signals(""):
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("a file")


@pytest.mark.parametrize(
    ("block", "number"), [(raise_on_signal, signal.SIGINT), (partial(block_signals, signal.SIGTERM), signal.SIGTERM)]
)
def test_ignored_signal_stays_ignored(block, number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with block():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_signals_are_passed_on_once(monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    with forward_signals([7, 8]):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert sent == [(7, signal.SIGTERM), (8, signal.SIGTERM)]


def test_interruptible_block_ends_at_once():
    with pytest.raises(Interrupted), defer_signals("") as stop, stop.at_once(allowed=True):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("goes on")
    with pytest.raises(Interrupted), defer_signals("") as stop:
        signal.raise_signal(signal.SIGTERM)
        with stop.at_once(allowed=True):
            pytest.fail("begins")
    with pytest.raises(Interrupted), defer_signals("") as stop:
        with stop.at_once(allowed=True):
            pass
        with stop.at_once(allowed=False):
            signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    with pytest.raises(RuntimeError, match="a worker"), defer_signals(""):
        raise RuntimeError("a worker has died")


@pytest.mark.parametrize("send", [signal.raise_signal, signal_in_thread])
def test_blocked_signal_is_raised_after_the_block_only(send):
    ended = []
    with pytest.raises(Interrupted) as stop, raise_on_signal(), block_signals(*interrupt.SIGNALS):
        send(signal.SIGTERM)
        ended.append("block")
    assert ended == ["block"] and stop.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_blocked_signal_follows_the_error_of_the_block():
    with pytest.raises(KeyboardInterrupt) as stop, block_signals(signal.SIGINT):
        signal_in_thread(signal.SIGINT)
        raise ValueError("of the block")
    assert isinstance(stop.value.__context__, ValueError)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
