import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from mistakes import assert_refused
from small_trainings import Stripes, segmenter, train_model, values_of
from torch import nn

from dinoseg.core.geometry import lattice
from dinoseg.data.transforms import Affine, Augment
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.training import image_data_module as feeding
from dinoseg.training import trainer as training
from dinoseg.training.checkpoint import Progress, read
from dinoseg.training.data_module import Validation, spread
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.meter import Meter
from dinoseg.training.optim import schedule
from dinoseg.training.time_limit import TimeLimit
from dinoseg.training.trainer import explain_score, selects_checkpoints
from dinoseg.training.validation import evaluate


def train(folder, *, head=None, batch_size=3, **options):
    """Train on stripes; return the progress, the rows of the log and the parts of the training."""
    model = segmenter(head)
    for parameter in model.head.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    images = Stripes([(32, 40)] * 6), Stripes([(32, 40), (19, 23), (19, 23), (40, 8)])
    data_module = ImageDataModule(*images, Augment((24, 32), affine=Affine(degrees=20)), batch_size, seed=0, workers=0)
    engine = Engine("cpu", "fp32", workers=0, eval_batch_size=2)
    return train_model(model, data_module, folder, engine=engine, **{"steps": 12, "val_every": 4, **options})


@pytest.fixture
def run(tmp_path):
    return partial(train, tmp_path)


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory):
    """Return a training of four steps, whose model the tests only evaluate."""
    return train(tmp_path_factory.mktemp("trained"), steps=4)


def test_loading_ends_with_the_steps(run, monkeypatch):
    """Reference cycles may hold the frame of the loop, and with it all batches, until the process ends."""
    frames, ended = [], []
    train_batches = ImageDataModule.train_batches

    def watch(batches):
        try:
            yield from batches
        finally:
            ended.append(len(frames))

    def held(module, start):
        frames.append(sys._getframe(1))
        return map(lambda batch: batch, watch(train_batches(module, start)))

    monkeypatch.setattr(ImageDataModule, "train_batches", held)
    run(steps=2)
    assert ended == [1]


def test_training_learns_and_stores_the_best(run, tmp_path):
    done = run(steps=40, val_every=10, lr=1e-2)
    losses = values_of(done.rows, "train/loss")
    assert len(losses) == 40 and losses[-1] < 0.3 * losses[0]
    assert not any("train/weight" in row for row in done.rows), "the divisor of the loss is no part of it"
    assert done.progress.step == 40 and done.progress.best > 0.9
    assert read(tmp_path / "last.safetensors").info["progress"]["step"] == 40
    assert [row["step"] for row in done.rows if "val/miou" in row] == [10, 20, 30, 40]


def test_scores_are_those_of_a_loop_over_whole_images(trained_model):
    model = trained_model.model
    data = trained_model.data_module.val
    shown = []
    loss = CrossEntropy(torch.ones(3))
    scores = evaluate(model, data, trained_model.engine, loss=loss, on_batch=lambda *batch: shown.append(batch))
    matrix = np.zeros((3, 3), int)
    losses = []
    model.eval()
    for index in range(4):
        sample = data[index]
        logits = model(sample["image"][None]).logits()[0].detach()
        for reference, predicted in zip(sample["mask"].flatten(), logits.argmax(0).flatten(), strict=True):
            if reference != 255:
                matrix[reference, predicted] += 1
        target = sample["mask"].long()
        losses.append(nn.functional.cross_entropy(logits[None], target[None], ignore_index=255).item())
    assert scores["matrix"] == matrix.tolist()
    assert [row["iou"] for row in scores["classes"]][2] is None or matrix[:, 2].sum() > 0
    iou = [matrix[k, k] / (matrix[k].sum() + matrix[:, k].sum() - matrix[k, k]) for k in (0, 1)]
    assert [row["iou"] for row in scores["classes"]][:2] == pytest.approx(iou)
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    (row,) = [row for row in trained_model.rows if "val/loss" in row]
    shares = [row.get(f"val/iou/{name}") for name in Stripes.classes]
    assert shares[:2] == pytest.approx(iou)
    assert row["val/miou"] == pytest.approx(np.mean([share for share in shares if share is not None]))
    # `on_batch` receives class ids, and the scores at the points of a lattice
    for batch, ids, logits in shown:
        whole = model(batch.image).logits().detach()
        assert torch.equal(whole.argmax(dim=1), ids.long())
        chosen = whole[..., *lattice(tuple(batch.mask.shape[-2:]))]
        torch.testing.assert_close(logits, chosen, rtol=1e-5, atol=1e-6)  # by matrix products
    assert sum(len(batch.names) for batch, _, _ in shown) == len(data)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_in_the_mode_it_was(trained_model, training):
    evaluate(trained_model.model.train(training), trained_model.data_module.val, trained_model.engine)
    assert trained_model.model.training == training


def test_validation_images_match_their_prediction_and_mask(trained_model, monkeypatch):
    model = trained_model.model.eval()
    data_module = trained_model.data_module
    monkeypatch.setattr(feeding, "compare", lambda *given, **_: given)
    monkeypatch.setattr(data_module, "pictures", 4)
    pictures = data_module.validate(model, CrossEntropy(torch.ones(3)), trained_model.engine).pictures
    assert list(pictures) == data_module.val.names
    for sample in map(data_module.val.__getitem__, range(4)):
        frame, predicted, mask = pictures[sample["name"]]
        expected = model(sample["image"][None]).logits()[0].argmax(0)
        assert np.array_equal(frame, sample["image"].permute(1, 2, 0)) and np.array_equal(mask, sample["mask"])
        assert np.array_equal(predicted, expected)


@pytest.fixture
def given(monkeypatch):
    """Return the progress that the head is given."""
    given = []
    monkeypatch.setattr(LinearHead, "set_progress", lambda _, *progress: given.append(progress))
    return given


def test_learning_rate_follows_the_schedule_and_head_progress(run, given):
    shape = schedule("poly", warmup=2, power=1.0)
    rows = run(steps=6, val_every=6, schedule=shape, lr=0.5e-3).rows
    expected = [0.5e-3 * share for share in (1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4)]
    assert values_of(rows, "train/lr") == pytest.approx(expected)
    assert given == [(step, 6) for step in range(6)]


def test_accumulated_batches_are_one_batch_to_the_label(run):
    """Weights and ignored pixels differ between the batches: the mean is over all labels, not over batches."""
    options = {"steps": 3, "head": lambda: MlpHead(24, 1, 3, 8), "loss": CrossEntropy(torch.tensor([0.2, 1.0, 3.0]))}
    whole = run(batch_size=4, **options)
    parts = run(batch_size=1, accumulate=4, **options)
    assert values_of(whole.rows, "train/loss") == pytest.approx(values_of(parts.rows, "train/loss"), rel=1e-5)
    for first, second in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_counts_validations_without_better_score(run, patience):
    """As in Keras and Lightning: the first validation sets the best score, and `patience` further ones end the run."""
    done = run(steps=40, val_every=1, patience=patience, lr=1e-12)
    assert done.progress.step == 1 + patience
    assert done.progress.stale == patience and done.progress.best_step == 1


def test_each_validation_is_a_line(run, caplog):
    caplog.set_level("INFO")
    share = f"{100 * run(steps=4).progress.best:.2f} %"
    line = rf"step 4 of 4: val/miou {share} \(best {share} at step 4\), val/loss \d+\.\d{{4}}, in \d+\.\d s"
    assert any(re.fullmatch(line, message) for message in caplog.messages), caplog.messages


def test_lowest_loss_can_select_the_best_checkpoint(run, caplog):
    caplog.set_level("INFO")
    done = run(steps=6, val_every=1, lr=0.1, score="loss")
    losses = {row["step"]: row["val/loss"] for row in done.rows if "val/loss" in row}
    best, step = done.progress.best, done.progress.best_step
    assert best == min(losses.values()) == losses[step]
    # a loss that is the score is stated once
    line = rf"step 6 of 6: val/loss {losses[6]:.4f} \(best {best:.4f} at step {step}\), in \d+\.\d s"
    assert any(re.fullmatch(line, message) for message in caplog.messages), caplog.messages


def test_moving_average_is_scored_and_saved(run, tmp_path):
    done = run(steps=3, val_every=3, ema=0.5)
    best, last = (read(tmp_path / f"{name}.safetensors").tensors for name in ("best", "last"))
    name = "head.classify.weight"
    assert best[f"model/{name}"].equal(last[f"ema/{name}"])
    assert not best[f"model/{name}"].equal(last[f"model/{name}"])
    assert last[f"model/{name}"].equal(done.model.head.classify.weight.detach())
    run(steps=4, ema=0.5)
    assert not read(tmp_path / "last.safetensors").tensors[f"ema/{name}"].equal(last[f"ema/{name}"])


NAMES = ("miou", "x", "x_infinite_images", "x_finite_mean")


def test_score_that_selects_no_checkpoint_is_refused(run):
    for name in ("iou", "matrix"):
        assert_refused(partial(run, score=name), f"trainer.score={name} is not a score. Choose one of", "miou")
    assert [name for name in NAMES if selects_checkpoints(name, NAMES)] == ["miou", "x"]
    assert "Choose one of miou, x." in str(explain_score("y", NAMES))
    for name in ("x_infinite_images", "x_finite_mean"):
        assert f"trainer.score={name} counts only some of the images. Set trainer.score=x" in str(
            explain_score(name, NAMES)
        )


def test_an_undefined_score_is_refused_by_name(run, monkeypatch):
    monkeypatch.setattr(ImageDataModule, "validate", lambda *_: Validation({"miou": None}, {}))
    assert_refused(lambda: run(steps=1), "trainer.score=miou is undefined")


def test_fewest_infinite_images_select_the_best_checkpoint(run, monkeypatch, caplog):
    found = iter([(2, None), (2, 5.0), (3, 1.0), (1, 9.0), (1, 9.5), (1, 8.0)])

    def validate(*_):
        infinite, mean = next(found)
        return Validation({"x": None, "x_infinite_images": float(infinite), "x_finite_mean": mean}, {})

    monkeypatch.setattr(ImageDataModule, "validate", validate)
    monkeypatch.setattr(ImageDataModule, "__post_init__", lambda self: vars(self).update(score_names=NAMES, lowest="x"))
    with caplog.at_level("INFO"):
        done = run(steps=6, val_every=1, score="x", lr=0.0)
    assert done.progress == Progress(6, best=8.0, best_infinite=1, best_step=6)
    lines = [message.partition(", in ")[0] for message in caplog.messages if "val/x" in message]
    assert lines[0].endswith("val/x infinite for 2 images (best infinite for 2 images at step 1)")
    best = "infinite for 1 image, 9.0000 for the others"
    assert lines[4].endswith(f"val/x infinite for 1 image, 9.5000 for the others (best {best} at step 4)")
    assert [(row["val/x"], row["val/x_infinite_images"]) for row in done.rows if "val/x" in row][-1] == (None, 1.0)


def test_logged_rows_score_the_batches_of_their_step(run):
    options = {"steps": 4, "lr": 1e-2, "accumulate": 2}
    rows = [row for row in run(**options, log_every=2).rows if "train/loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(0 < row["train/miou"] <= row["train/accuracy"] <= 1 for row in rows)
    every = {row["step"]: row for row in run(**options).rows if "train/loss" in row}
    for row in rows:  # a function of the step, not of the steps since the last row
        assert row["train/miou"] == every[row["step"]]["train/miou"]


def slow_down(monkeypatch, owner, name, now, seconds):
    """Let each call of a function take so many seconds of a fake clock."""
    whole = getattr(owner, name)

    def slow(*given, **options):
        now[0] += seconds
        return whole(*given, **options)

    monkeypatch.setattr(owner, name, slow)


def test_the_speed_of_training_has_no_validation_in_it(run, monkeypatch):
    def meter(done, steps, val_every, epoch, *rest, limit):
        assert epoch == 1  # six images in batches of three, two of them a step
        return Meter(done, steps, val_every, epoch, *rest, limit=limit, clock=lambda: now[0])

    now = [0.0]
    monkeypatch.setattr(training, "Meter", meter)
    slow_down(monkeypatch, training, "set_learning_rates", now, 1)
    slow_down(monkeypatch, ImageDataModule, "validate", now, 60)
    assert values_of(run(steps=4, val_every=1, accumulate=2).rows, "train/images_per_s") == [6, 6, 6, 6]


def test_validation_images_are_spread_over_the_first_rank():
    assert spread(10, 3, 1) == [0, 4, 9] and spread(10, 3, 4) == [0, 4, 8]
    assert spread(2, 5, 1) == [0, 1] and spread(5, 0, 1) == []


@pytest.fixture
def slow(monkeypatch):
    """Let each learning-rate update take 5 s of a fake clock, by which the time limit counts; return its seconds."""
    now = [0.0]
    slow_down(monkeypatch, training, "set_learning_rates", now, 5)
    monkeypatch.setattr(training, "TimeLimit", partial(TimeLimit, clock=lambda: now[0]))
    return now


def test_training_ends_validated_and_saved_within_its_limit(run, tmp_path, slow, given):
    start = None
    for step in (12, 24):  # the limit of a resumed run counts anew
        done = run(steps=40, val_every=30, max_minutes=1, start=start)
        assert done.progress.step == step and not done.progress.validation_pending and done.progress.best_step > 0
        assert [row["step"] for row in done.rows if "val/miou" in row] == [step]
        start = read(tmp_path / "last.safetensors")
        assert start.info["progress"]["step"] == step and not start.info["progress"]["validation_pending"]
        assert (tmp_path / "best.safetensors").exists()
        if step == 12:  # the learning rate and the head follow the steps that fit
            rates = values_of(done.rows, "train/lr")
            assert given[0] == (0, 40) and given[-1] == (11, 12) and rates[-1] < 0.1 * rates[0]


def test_time_limit_leaves_time_for_the_last_validation(run, slow, monkeypatch):
    slow_down(monkeypatch, ImageDataModule, "validate", slow, 15)
    assert run(steps=40, val_every=2, max_minutes=1).progress.step == 4 and slow[0] == 50
