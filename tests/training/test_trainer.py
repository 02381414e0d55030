import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoint_files import INFO
from log_rows import Rows
from torch import nn

from dinoseg.core.geometry import lattice
from dinoseg.data.transforms import Affine, Augment
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.models.adapters import Full
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training import image_data_module as feeding
from dinoseg.training import trainer as training
from dinoseg.training.checkpoint import Checkpointer, read
from dinoseg.training.data_module import Validation, spread
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.meter import Meter
from dinoseg.training.optim import adamw, schedule
from dinoseg.training.progress import Progress
from dinoseg.training.time_limit import TimeLimit
from dinoseg.training.trainer import Experiment, Settings, check_score, fit
from dinoseg.training.validation import evaluate
from dinoseg.utils.errors import UserError


class Stripes:
    """Pictures whose upper half is dark and of class 0, the lower bright and of class 1; the border is ignored."""

    classes, palette, ignore_index = ("dark", "bright", "never"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)), 255

    def __init__(self, sizes):
        self.sizes = sizes
        self.names = [str(number) for number in range(len(sizes))]

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        height, width = self.sizes[index]
        draw = np.random.default_rng(index)
        mask = np.zeros((height, width), np.uint8)
        mask[height // 2 :] = 1
        image = (mask[None] * 150 + draw.integers(0, 60, (3, height, width))).astype(np.uint8)
        mask[:, :2] = 255
        return {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask), "name": self.names[index]}


@pytest.fixture
def run(tiny_backbone, tmp_path):
    """Train on stripes; return the progress, the log and the model."""

    def train(**options):
        torch.manual_seed(0)
        model = SegmentationModel(Full()(tiny_backbone()), options.pop("head", None) or LinearHead(24, 1, 3))
        for parameter in model.head.parameters():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        train_set, val_set = Stripes([(32, 40)] * 6), Stripes([(32, 40), (19, 23), (19, 23), (40, 8)])
        data_module = ImageDataModule(
            train_set,
            val_set,
            Augment((24, 32), affine=Affine(degrees=20)),
            batch_size=options.pop("batch_size", 3),
            seed=0,
            workers=0,
        )
        log, engine = Rows(), Engine("cpu", "fp32", workers=0, eval_batch_size=2)
        optimizer = adamw(model, lr=options.pop("lr", 3e-3))
        loss = CrossEntropy(options.pop("weights", torch.ones(3)))
        start = options.pop("start", None)
        shape = options.pop("schedule", schedule())
        settings = Settings(**{"steps": 12, "val_every": 4, "log_every": 1, **options})
        checkpoints = Checkpointer(tmp_path, dict(INFO), start)
        progress = fit(Experiment(model, loss, data_module, optimizer, shape, engine, checkpoints, log, settings))
        return SimpleNamespace(progress=progress, rows=log.rows, model=model, data_module=data_module, engine=engine)

    return train


def test_training_learns_and_stores_the_best(run, tmp_path):
    done = run(steps=40, val_every=10, lr=1e-2)
    losses = [row["train/loss"] for row in done.rows if "train/loss" in row]
    assert len(losses) == 40 and losses[-1] < 0.3 * losses[0]
    assert not any("train/weight" in row for row in done.rows), "the divisor of the loss is no part of it"
    assert done.progress.step == 40 and done.progress.best > 0.9
    assert read(tmp_path / "last.safetensors").info["progress"]["step"] == 40
    assert [row["step"] for row in done.rows if "val/miou" in row] == [10, 20, 30, 40]


def test_scores_are_those_of_a_loop_over_whole_images(run):
    done = run(steps=4)
    scores = evaluate(done.model, done.data_module.val, done.engine, loss=CrossEntropy(torch.ones(3)))
    matrix, losses = np.zeros((3, 3), int), []
    done.model.eval()
    for index in range(4):
        sample = done.data_module.val[index]
        logits = done.model(sample["image"][None]).logits()[0].detach()
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


def test_on_batch_receives_class_ids_and_lattice_logits(run):
    done, shown = run(steps=2), []
    evaluate(done.model, done.data_module.val, done.engine, on_batch=lambda *batch: shown.append(batch))
    for batch, ids, logits in shown:
        whole = done.model.eval()(batch.image).logits().detach()
        assert torch.equal(whole.argmax(dim=1), ids.long())
        chosen = whole[..., *lattice(tuple(batch.mask.shape[-2:]))]
        torch.testing.assert_close(logits, chosen, rtol=1e-5, atol=1e-6)  # by matrix products
    assert sum(len(batch.names) for batch, _, _ in shown) == len(done.data_module.val)


def test_evaluation_leaves_the_model_in_the_mode_it_was(run):
    done = run(steps=2, val_every=1)
    assert done.model.training
    evaluate(done.model.eval(), done.data_module.val, done.engine)
    assert not done.model.training


def test_the_learning_rate_follows_the_schedule(run):
    done = run(steps=6, schedule=schedule("poly", warmup=2, power=1.0), lr=0.5e-3)
    rates = [row["train/lr"] for row in done.rows if "train/lr" in row]
    assert rates == pytest.approx([0.5e-3 * share for share in (1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4)])


def test_accumulated_batches_are_one_batch_to_the_label(run):
    """Weights and ignored pixels differ between the batches: the mean is over all labels, not over batches."""
    options = {"steps": 3, "head": MlpHead(24, 1, 3, 8), "weights": torch.tensor([0.2, 1.0, 3.0])}
    whole = run(batch_size=4, **options)
    options["head"] = MlpHead(24, 1, 3, 8)
    parts = run(batch_size=1, accumulate=4, **options)
    losses = [[row["train/loss"] for row in done.rows if "train/loss" in row] for done in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for first, second in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_counts_validations_without_better_score(run, patience):
    """As in Keras and Lightning: the first validation sets the best score, and `patience` further ones end the run."""
    done = run(steps=40, val_every=1, patience=patience, lr=1e-12)
    assert done.progress.step == 1 + patience
    assert done.progress.stale == patience and done.progress.best_step == 1


def test_each_validation_is_a_line(run, caplog):
    with caplog.at_level("INFO"):
        best = run(steps=4, val_every=4).progress.best
    share = f"{100 * best:.2f} %"
    line = rf"step 4 of 4: val/miou {share} \(best {share} at step 4\), val/loss \d+\.\d{{4}}, in \d+\.\d s"
    assert any(re.fullmatch(line, message) for message in caplog.messages), caplog.messages


def test_a_loss_that_is_the_score_is_stated_once(run, caplog):
    with caplog.at_level("INFO"):
        best = run(steps=4, val_every=4, score="loss").progress.best
    line = rf"step 4 of 4: val/loss {best:.4f} \(best {best:.4f} at step 4\), in \d+\.\d s"
    assert any(re.fullmatch(line, message) for message in caplog.messages), caplog.messages


def test_moving_average_is_scored_and_saved(run, tmp_path):
    done = run(steps=3, val_every=3, ema=0.5)
    best, last = (read(tmp_path / f"{name}.safetensors") for name in ("best", "last"))
    assert best.tensors["model/head.classify.weight"].equal(last.tensors["ema/head.classify.weight"])
    assert not best.tensors["model/head.classify.weight"].equal(last.tensors["model/head.classify.weight"])
    assert last.tensors["model/head.classify.weight"].equal(done.model.head.classify.weight.detach())
    run(steps=4, val_every=4, ema=0.5)
    assert (
        not read(tmp_path / "last.safetensors")
        .tensors["ema/head.classify.weight"]
        .equal(last.tensors["ema/head.classify.weight"])
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "iou"}, "trainer.score=iou is not a score. Choose one of .*miou"),
        ({"score": "matrix"}, "trainer.score=matrix is not a score"),
    ],
)
def test_bad_settings_are_refused(run, options, message):
    with pytest.raises(UserError, match=message):
        run(**options)


def test_an_undefined_score_is_refused_by_name(run, monkeypatch):
    monkeypatch.setattr(ImageDataModule, "validate", lambda *_: Validation({"miou": None}, {}))
    with pytest.raises(UserError, match="trainer.score=miou is undefined"):
        run(steps=1)


def test_fewest_infinite_images_select_the_best_checkpoint(run, monkeypatch, caplog):
    found = iter([(2, None), (2, 5.0), (3, 1.0), (1, 9.0), (1, 9.5), (1, 8.0)])

    def validate(*_):
        infinite, mean = next(found)
        return Validation({"x": None, "x_infinite_images": float(infinite), "x_finite_mean": mean}, {})

    monkeypatch.setattr(ImageDataModule, "validate", validate)
    monkeypatch.setattr(ImageDataModule, "__post_init__", lambda self: vars(self).update(score_names="x", lowest="x"))
    with caplog.at_level("INFO"):
        done = run(steps=6, val_every=1, score="x", lr=0.0)
    assert done.progress == Progress(6, best=8.0, best_infinite=1, best_step=6)
    lines = [message.partition(", in ")[0] for message in caplog.messages if "val/x" in message]
    assert lines[0].endswith("val/x infinite for 2 images (best infinite for 2 images at step 1)")
    best = "infinite for 1 image, 9.0000 for the others"
    assert lines[4].endswith(f"val/x infinite for 1 image, 9.5000 for the others (best {best} at step 4)")
    assert [(row["val/x"], row["val/x_infinite_images"]) for row in done.rows if "val/x" in row][-1] == (None, 1.0)


@pytest.mark.parametrize("score", ["x_infinite_images", "x_finite_mean"])
def test_half_of_an_infinite_score_selects_no_checkpoint(score):
    names = ("miou", "x", "x_infinite_images", "x_finite_mean")
    with pytest.raises(UserError, match=f"trainer.score={score} .*Set trainer.score=x:"):
        check_score(score, names)
    check_score("x", names)
    with pytest.raises(UserError, match="Choose one of miou, x.$"):
        check_score("y", names)


def test_logged_rows_score_the_batches_of_their_step(run):
    options = {"steps": 8, "val_every": 8, "log_every": 4, "lr": 1e-2, "accumulate": 2}
    rows = [row for row in run(**options).rows if "train/loss" in row]
    assert [row["step"] for row in rows] == [4, 8]
    assert all(0 < row["train/miou"] <= row["train/accuracy"] <= 1 for row in rows)
    every = {row["step"]: row for row in run(**{**options, "log_every": 1}).rows if "train/loss" in row}
    for row in rows:  # a function of the step, not of the steps since the last row
        assert row["train/miou"] == every[row["step"]]["train/miou"]


def test_head_receives_the_training_progress(run):
    class Annealed(LinearHead):
        def set_progress(self, step, steps):
            given.append((step, steps))

    given = []
    run(steps=4, head=Annealed(24, 1, 3))
    assert given == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_the_speed_of_training_has_no_validation_in_it(run, monkeypatch):
    def takes(seconds, whole):
        def call(*given, **options):
            now[0] += seconds
            return whole(*given, **options)

        return call

    def meter(done, steps, val_every, epoch, *rest, limit):
        assert epoch == 1  # six images in batches of three, two of them a step
        return Meter(done, steps, val_every, epoch, *rest, limit=limit, clock=lambda: now[0])

    now = [0.0]
    monkeypatch.setattr(training, "Meter", meter)
    monkeypatch.setattr(training, "set_learning_rates", takes(1, training.set_learning_rates))
    monkeypatch.setattr(ImageDataModule, "validate", takes(60, ImageDataModule.validate))
    rows = run(steps=4, val_every=1, accumulate=2).rows
    assert [row["train/images_per_s"] for row in rows if "train/images_per_s" in row] == [6, 6, 6, 6]


def test_validation_rows_have_the_iou_of_each_class(run):
    (row,) = [row for row in run(steps=2).rows if "val/loss" in row]
    shares = [row.get(f"val/iou/{name}") for name in Stripes.classes]
    assert row["val/miou"] == pytest.approx(np.mean([share for share in shares if share is not None]))
    assert None not in shares[:2]


def test_lowest_loss_can_select_the_best_checkpoint(run):
    done = run(steps=6, val_every=1, lr=0.1, score="loss")
    losses = {row["step"]: row["val/loss"] for row in done.rows if "val/loss" in row}
    assert done.progress.best == min(losses.values())
    assert losses[done.progress.best_step] == done.progress.best


def test_validation_images_match_their_prediction_and_mask(run, monkeypatch):
    done = run(steps=1)
    monkeypatch.setattr(feeding, "compare", lambda *given, **_: given)
    done.data_module.pictures = 4
    pictures = done.data_module.validate(done.model.eval(), CrossEntropy(torch.ones(3)), done.engine).pictures
    assert list(pictures) == done.data_module.val.names
    for sample in map(done.data_module.val.__getitem__, range(4)):
        frame, predicted, mask = pictures[sample["name"]]
        expected = done.model(sample["image"][None]).logits()[0].argmax(0)
        assert np.array_equal(frame, sample["image"].permute(1, 2, 0)) and np.array_equal(mask, sample["mask"])
        assert np.array_equal(predicted, expected)


def test_validation_images_are_spread_over_the_first_rank():
    assert spread(10, 3, 1) == [0, 4, 9] and spread(10, 3, 4) == [0, 4, 8]
    assert spread(2, 5, 1) == [0, 1] and spread(5, 0, 1) == []


@pytest.fixture
def slow(monkeypatch):
    """Let each learning-rate update take 5 s of a fake clock, by which the time limit counts; return its seconds."""
    now, update = [0.0], training.set_learning_rates

    def slow_update(*given):
        now[0] += 5
        return update(*given)

    monkeypatch.setattr(training, "set_learning_rates", slow_update)
    monkeypatch.setattr(training, "TimeLimit", partial(TimeLimit, clock=lambda: now[0]))
    return now


def test_training_ends_validated_and_saved_within_its_limit(run, tmp_path, slow):
    start = None
    for step in (12, 24):  # the limit of a resumed run counts anew
        done = run(steps=40, val_every=30, max_minutes=1, start=start)
        assert done.progress.step == step and not done.progress.validation_pending and done.progress.best_step > 0
        assert [row["step"] for row in done.rows if "val/miou" in row] == [step]
        start = read(tmp_path / "last.safetensors")
        assert start.info["progress"]["step"] == step and not start.info["progress"]["validation_pending"]
        assert (tmp_path / "best.safetensors").exists()


def test_learning_rate_and_head_follow_the_steps_that_fit(run, slow):
    class Annealed(LinearHead):
        def set_progress(self, step, steps):
            given.append((step, steps))

    given = []
    done = run(steps=40, val_every=30, max_minutes=1, head=Annealed(24, 1, 3))
    rates = [row["train/lr"] for row in done.rows if "train/lr" in row]
    assert given[0] == (0, 40) and given[-1] == (11, 12)
    assert rates[-1] < 0.1 * rates[0]


def test_time_limit_leaves_time_for_the_last_validation(run, slow, monkeypatch):
    validate = ImageDataModule.validate

    def slow_validate(*given):
        slow[0] += 15
        return validate(*given)

    monkeypatch.setattr(ImageDataModule, "validate", slow_validate)
    assert run(steps=40, val_every=2, max_minutes=1).progress.step == 4 and slow[0] == 50
