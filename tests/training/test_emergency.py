"""A training that ends early keeps its last whole step, and goes on from it as if it had never stopped."""

import math
import signal
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from failing import fail_after
from log_rows import Rows
from small_trainings import Stripes, segmenter, train_model, without_timings

from dinoseg.data.transforms import Affine, Augment
from dinoseg.models.heads.linear import LinearHead
from dinoseg.training import checkpoint
from dinoseg.training.checkpoint import read
from dinoseg.training.data_module import Validation
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.step import NonFiniteLoss, StepScores
from dinoseg.utils.errors import UserError
from dinoseg.utils.interrupt import Interrupted

pytestmark = pytest.mark.slow  # trains in each test


class Failing(ImageDataModule):
    """A feed that does something before it draws a batch, or before a validation, of a number each."""

    batch = validation = -1
    fails = staticmethod(lambda: None)
    validated = 0

    def train_batches(self, start):
        for number, batch in enumerate(super().train_batches(start), start=start):
            if number == self.batch:
                self.fails()
            yield batch

    def validate(self, model, loss, engine):
        self.validated += 1
        if self.validated == self.validation:
            self.fails()
        scores, pictures = super().validate(model, loss, engine)
        return Validation(scores | {"drawn": torch.rand(()).item()}, pictures)  # as slots draw where they start


def train(folder, start=None, **options):
    """Train with dropout, a moving average and two batches a step; return the error, if any, and the rows."""
    augment = Augment((24, 32), affine=Affine(degrees=20))
    data_module = Failing(Stripes([(32, 40)] * 6), Stripes([(32, 40), (19, 23)]), augment, 3, seed=0, workers=0)
    for name in ("batch", "validation", "fails"):
        setattr(data_module, name, options.pop(name, getattr(data_module, name)))
    found = read(folder / "last.safetensors") if start else None
    settings = {"steps": 6, "val_every": 3, "accumulate": 2, "ema": 0.5, **options}
    model = segmenter(lambda: LinearHead(24, 1, 3, dropout=0.1))
    log = Rows()
    error = None
    try:
        train_model(model, data_module, folder, start=found, log=log, **settings)
    except (Exception, Interrupted) as caught:
        error = caught
    return SimpleNamespace(error=error, rows=log.rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Train without a stop; return the folder and the rows."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(folder)
    assert done.error is None
    return SimpleNamespace(folder=folder, rows=done.rows)


def truncated():
    raise UserError("7.png is truncated")


def terminate():
    signal.raise_signal(signal.SIGTERM)


def crash():
    raise RuntimeError("a worker has died")


STOPS = [({"batch": 8}, 4), ({"batch": 9}, 4), ({"validation": 1}, 3), ({"validation": 2}, 6)]


@pytest.mark.parametrize(
    ("fails", "where", "step"),
    [
        *((truncated, *stop) for stop in STOPS),
        *(pytest.param(terminate, *stop, marks=pytest.mark.heavy) for stop in (STOPS[0], STOPS[2])),
        *((terminate, *stop) for stop in (STOPS[1], STOPS[3])),
        (crash, *STOPS[1]),
        pytest.param(crash, *STOPS[2], marks=pytest.mark.heavy),
    ],
)
def test_interrupted_training_is_saved_and_resumes_exactly(whole, tmp_path, fails, where, step):
    """Also in the middle of a step, between its two batches, and in the validation after the last step."""
    ended = train(tmp_path, fails=fails, **where)
    assert isinstance(ended.error, Interrupted if fails is terminate else (UserError, RuntimeError))
    finished = fails is terminate and "batch" in where  # a signal lets the step come to its end
    assert read(tmp_path / "last.safetensors").info["progress"]["step"] == step + finished
    gone_on = train(tmp_path, start=True)
    assert gone_on.error is None
    for name in ("last", "best"):
        one, two = (read(folder / f"{name}.safetensors") for folder in (whole.folder, tmp_path))
        assert one.info["progress"] == two.info["progress"] and one.tensors.keys() == two.tensors.keys()
        assert [key for key in one.tensors if not one.tensors[key].equal(two.tensors[key])] == []
    assert without_timings(ended.rows + gone_on.rows) == without_timings(whole.rows)


@pytest.mark.parametrize("at", [1, 2])
def test_an_update_that_fails_half_way_is_not_saved(tmp_path, monkeypatch, at):
    assert train(tmp_path, steps=2).error is None
    before = (tmp_path / "last.safetensors").read_bytes()
    fail_after(monkeypatch, torch.optim.AdamW, "step", at - 1, RuntimeError("a worker has died"))
    assert isinstance(train(tmp_path, start=True, val_every=9).error, RuntimeError)
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_a_rank_that_is_lost_before_the_update_costs_no_step(tmp_path, monkeypatch):
    fail_after(monkeypatch, Engine, "total", 2, RuntimeError("a worker has died"))
    assert isinstance(train(tmp_path).error, RuntimeError)
    assert read(tmp_path / "last.safetensors").info["progress"]["step"] == 2


@pytest.mark.parametrize("at", [1, 2])
def test_non_finite_loss_preserves_the_earlier_checkpoint(tmp_path, monkeypatch, at):
    """The steps that led to it are of no use: going on from them would end there again."""
    calls = count(1)
    total = Engine.total
    nan = torch.tensor([math.nan, 1.0, 0.0])
    monkeypatch.setattr(Engine, "total", lambda *given: nan if next(calls) == at else total(*given))
    assert isinstance(train(tmp_path).error, NonFiniteLoss) and not list(tmp_path.iterdir())


def test_unchanged_or_unwanted_state_is_not_saved(tmp_path):
    def again():
        raise Interrupted(signal.SIGTERM, again=True)

    assert isinstance(train(tmp_path / "first", batch=0, fails=truncated).error, UserError)
    assert isinstance(train(tmp_path / "second", batch=4, fails=again).error, Interrupted)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_original_error_is_raised_if_saving_fails(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint.Checkpointer, "save", lambda *_: crash())
    assert str(train(tmp_path, batch=4, fails=truncated).error) == "7.png is truncated"
    assert "Training stopped after step 2, which could not be saved: a worker has died" in caplog.text


def refuse_best(path, *rest, write=checkpoint.write):
    if path.name.startswith("best"):
        raise UserError("the disk is full")
    write(path, *rest)


@pytest.mark.parametrize(
    ("owner", "name", "fails", "said"),
    [(checkpoint, "write", refuse_best, "the disk is full"), (Rows, "images", lambda *_: crash(), "a worker has died")],
    ids=["best is not written", "images are not logged"],
)
def test_a_validation_that_cannot_be_stored_is_pending(tmp_path, monkeypatch, owner, name, fails, said):
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fails)
        assert str(train(tmp_path).error) == said
    progress = read(tmp_path / "last.safetensors").info["progress"]
    assert progress["validation_pending"] and progress["best"] is None and progress["step"] == 3


@pytest.mark.parametrize("writes", [True, False])
def test_only_the_writing_rank_reports_the_saved_step(tmp_path, caplog, writes):
    train(tmp_path, batch=4, fails=truncated, writes=writes)
    assert ("and that step is saved" in caplog.text) == writes == (tmp_path / "last.safetensors").exists()


def test_nan_score_selects_no_best_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageDataModule, "validate", lambda *_: Validation({"miou": math.nan}, {}))
    error = train(tmp_path).error
    assert isinstance(error, NonFiniteLoss) and str(error).startswith("val/miou is nan at step 3")
    assert not (tmp_path / "best.safetensors").exists()


def test_a_step_whose_ranks_cannot_be_counted_is_saved_with_its_row(tmp_path, whole, monkeypatch):
    """Another rank that dies after the update ends the collective sum of the step's scores."""
    numbers, tally = count(1), StepScores.read

    def die(scores):
        if next(numbers) == 2:
            raise RuntimeError("Connection closed by peer")
        return tally(scores)

    monkeypatch.setattr(StepScores, "read", die)
    stopped = train(tmp_path)
    assert "closed by peer" in str(stopped.error) and [row["step"] for row in stopped.rows] == [1, 2]
    assert "train/loss" in stopped.rows[1] and "train/miou" not in stopped.rows[1]
    assert read(tmp_path / "last.safetensors").info["progress"]["step"] == 2
    rest = train(tmp_path, start=True)
    assert without_timings(rest.rows) == [row for row in without_timings(whole.rows) if row["step"] > 2]
