"""Several heads on one frozen backbone: one pass and one loss for all, and none has an influence on another."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from checkpoint_files import INFO
from mistakes import assert_refused
from small_trainings import Stripes, train_model
from torch import nn

from dinoseg.core.shapes import Batch
from dinoseg.data.transforms import Augment
from dinoseg.experiment.models import _lend_tensors
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.weighted_sum import WeightedSum
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training.checkpoint import Checkpointer, read
from dinoseg.training.data_module import Validation
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.multi_head import (
    HeadClipping,
    MultiHead,
    MultiHeadCheckpointer,
    MultiHeadDataModule,
    MultiHeadLoss,
    MultiHeadSegmenter,
    best_of,
    join_optimizers,
)
from dinoseg.training.optim import adamw
from dinoseg.training.progress import Progress
from dinoseg.training.step import NonFiniteLoss

IMAGES = torch.randint(0, 256, (2, 3, 17, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MASKS = torch.randint(0, 3, (2, 17, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
RATES = (1e-2, 3e-3)
LENGTHS = {"steps": 6, "val_every": 2, "accumulate": 2, "clip": 0.5, "ema": 0.5}


class Own(LinearHead):
    """A head that runs the backbone in a way of its own."""

    def run(self, backbone, images):
        return self(backbone(images))


class Rough(LinearHead):
    """A head that changes its features."""

    def forward(self, features):
        return super().forward([nn.functional.relu_(part) for part in features])


class Failing(LinearHead):
    """A head whose outputs are not finite in one of its passes in training."""

    fails_at = 6
    passes = 0

    def forward(self, features):
        self.passes += self.training
        return super().forward(features) * (torch.nan if self.training and self.passes == self.fails_at else 1)


TWO_HEADS = {"a": ((1,), LinearHead), "b": ((0,), LinearHead)}


@pytest.fixture
def shared_parts(tiny_backbone):
    """Return a maker of a model of several heads, and the passes of the backbone so far."""
    whole, passes = tiny_backbone((0, 1)).requires_grad_(False).eval(), []
    whole.norm.register_forward_hook(lambda *_: passes.append(1))

    def model(**heads):
        models = {}
        for name, (layers, head) in heads.items():
            part = tiny_backbone(layers).requires_grad_(False)
            _lend_tensors(whole, part)
            torch.manual_seed(len(layers))
            models[name] = SegmentationModel(part, head(24, len(layers), 3))
        return MultiHeadSegmenter(whole, models)

    return SimpleNamespace(model=model, passes=passes)


def test_each_head_gets_its_own_blocks_of_one_pass(shared_parts):
    layers = {"a": (-1,), "b": (0,), "c": (0, 1), "d": (1, 0)}
    model = shared_parts.model(**{name: (each, LinearHead) for name, each in layers.items()}).eval()
    for images in (IMAGES, IMAGES[:, :, :1, :1], IMAGES.float() / 255):
        shared_parts.passes.clear()
        predictions = model(images).heads
        assert len(shared_parts.passes) == 2, "a norm for each of two blocks"
        for name, prediction in predictions.items():
            assert torch.equal(prediction.scores(), model.models[name].eval()(images).scores())


def test_a_head_with_a_way_of_its_own_runs_the_backbone(shared_parts):
    model = shared_parts.model(a=((1,), Own)).eval()
    assert torch.equal(model(IMAGES).heads["a"].scores(), model.models["a"].eval()(IMAGES).scores())
    assert not shared_parts.passes
    rough = shared_parts.model(a=((1,), LinearHead), b=((1,), Rough)).train()
    assert_refused(lambda: rough(IMAGES), "b modified its input features in place")


LOSSES = {
    "mean": lambda: CrossEntropy(torch.tensor([1.0, 2.0, 0.5])),
    "two divisors": lambda: WeightedSum(
        {"ce": partial(CrossEntropy, average="labelled"), "all": partial(CrossEntropy, average="all")},
        {"ce": 1.0, "all": 0.5},
        class_weights=torch.ones(3),
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_adds_up_those_of_the_heads(shared_parts, kind):
    model, loss = shared_parts.model(**TWO_HEADS).eval(), LOSSES[kind]()
    prediction, batch = model(IMAGES), Batch(IMAGES, MASKS, ["x", "y"])
    both, alone = MultiHeadLoss(loss), {name: loss(each, batch) for name, each in prediction.heads.items()}
    value, parts = both(prediction, batch)
    assert value.item() == pytest.approx(sum(each.item() for each, _ in alone.values()))
    assert all(parts[f"{name}/loss"] == each for name, (each, _) in alone.items())
    assert parts.get("weight") == alone["a"][1].get("weight")
    assert both.num_divisors == loss.num_divisors and torch.equal(both.divisors(batch), loss.divisors(batch))
    total, whole, _ = both.step_loss(prediction, batch, 2 * loss.divisors(batch))
    assert (total.item(), whole.item()) == pytest.approx((value.item() / 2, value.item()))


def test_non_finite_head_loss_counts_as_zero(shared_parts):
    model = shared_parts.model(**TWO_HEADS).eval()
    with torch.no_grad():
        model.models["b"].head.classify.bias[0] = torch.inf
    prediction, batch = model(IMAGES), Batch(IMAGES, MASKS, ["x", "y"])
    loss = CrossEntropy(torch.ones(3), hard_fraction=0.5)
    value, parts = MultiHeadLoss(loss)(prediction, batch)
    value.backward()
    assert value == parts["a/loss"] and not parts["b/loss"].isfinite()
    assert parts["weight"] == loss(prediction.heads["a"], batch)[1]["weight"]
    finite = {name: each.head.classify.weight.grad.isfinite() for name, each in model.models.items()}
    assert finite["a"].all() and not finite["b"].any()


def test_heads_share_progress_and_the_largest_minimum_batch():
    heads, given = [LinearHead(24, 1, 3) for _ in range(2)], []
    for head in heads:
        head.set_progress = lambda *progress: given.append(progress)
    heads[0].min_batch_size = 2
    several = MultiHead(heads)
    several.set_progress(7, 9)
    assert given == [(7, 9), (7, 9)] and several.min_batch_size == 2


def test_heads_are_clipped_apart_and_leave_with_their_step():
    """The second has a gradient that is not finite."""
    heads, engine = MultiHead([LinearHead(1, 1, 2) for _ in range(3)]), Engine("cpu", "fp32")
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [each], "head": number} for number, each in enumerate(weights)], lr=1.0)
    heads.set_progress(7, 9)

    def step(*gradients):
        for each, gradient in zip(weights, gradients, strict=True):
            each.grad = torch.tensor(gradient)
        return engine.optimizer_step(optimizer, torch.tensor(4.0), torch.tensor(2.0), clip=HeadClipping(heads, 1.0))

    mean, norm = step([6.0, 8.0], [torch.nan, 1.0], [0.6, 0.8])
    assert mean == 2 and norm.item() == pytest.approx((5**2 + 0.5**2) ** 0.5)
    assert heads.left_at.tolist() == [-1, 7, -1]
    for each, moved in zip(weights, ([0.6, 0.8], [0.0, 0.0], [0.3, 0.4]), strict=True):
        torch.testing.assert_close(1 - each, torch.tensor(moved), atol=1e-5, rtol=0)
    heads.set_progress(8, 9)
    assert step([1.0, 0.0], [1.0, 0.0], [0.0, 0.0])[1] == 0.5 and weights[1].tolist() == [1.0, 1.0]
    assert step([torch.inf, 0.0], [1.0, 0.0], [torch.nan, 0.0])[1].isnan()
    assert heads.left_at.tolist() == [8, 7, 8]


def striped(kind):
    """Return batches of stripes in which odd sizes are validated."""
    images = Stripes([(32, 40)] * 6), Stripes([(32, 40), (19, 23)])
    return kind(*images, Augment((24, 32)), 3, seed=0, workers=0)


@pytest.fixture
def train(shared_parts, tmp_path):
    """Train heads by name, two with a linear head by default; return the parts of the training and its folder."""

    def run(folder, start=False, data=MultiHeadDataModule, heads=TWO_HEADS, info=INFO, **options):
        folder, options = tmp_path / folder, LENGTHS | options
        model = shared_parts.model(**heads)
        solo = {name: Checkpointer(folder / "heads" / name, dict(info)) for name in heads}
        found = read(folder / "last.safetensors") if start else None
        alone = [adamw(each, lr=rate) for each, rate in zip(model.models.values(), RATES, strict=False)]
        parts = {
            "optimizer": join_optimizers(alone),
            "checkpoints": MultiHeadCheckpointer(folder, dict(info), found, heads=solo),
            "clipping": HeadClipping(model.head, options["clip"]),
            "loss": MultiHeadLoss(CrossEntropy(torch.ones(3))),
        }
        done = train_model(model, striped(data), folder, **parts, **options)
        done.folder = folder
        return done

    return run


def bests_of(run):
    """Return the best step of each head."""
    return {name: head.progress.best_step for name, head in run.checkpoints.heads.items()}


def best_of_head(run, name):
    return read(run.folder / f"heads/{name}/best.safetensors").tensors


def test_a_head_without_random_draws_equals_its_own_run(train, tiny_backbone, tmp_path):
    run = train("both", heads={"a": ((1,), LinearHead), "b": ((0, 1), LinearHead)})
    backbone = tiny_backbone((1,)).requires_grad_(False).eval()
    torch.manual_seed(1)
    model = SegmentationModel(backbone, LinearHead(24, 1, 3))
    rows = train_model(model, striped(ImageDataModule), tmp_path / "alone", lr=RATES[0], **LENGTHS).rows
    # to 1e-5: the backbone takes the images in other chunks
    best = read(tmp_path / "alone/best.safetensors").tensors
    torch.testing.assert_close(best_of_head(run, "a"), best, rtol=1e-5, atol=1e-5)
    for mine, alone in zip(run.rows, rows, strict=True):
        for key in ("val/miou", "val/accuracy", "val/loss"):
            if key in alone:
                assert mine[key.replace("/", "/a/")] == pytest.approx(alone[key], rel=1e-4)
    validated = [row for row in run.rows if "val/miou" in row]
    assert all(row["val/miou"] == max(row["val/a/miou"], row["val/b/miou"]) for row in validated)
    for row in validated:  # the logged loss is the lowest of the heads
        losses = row["val/a/loss"], row["val/b/loss"]
        assert row["val/loss"] == min(losses) < max(losses)


def test_a_validation_without_a_head_left_is_refused(shared_parts):
    model = shared_parts.model(a=((1,), LinearHead))
    model.head.remove(torch.tensor([True]))
    validate = partial(striped(MultiHeadDataModule).validate, model, MultiHeadLoss(CrossEntropy(torch.ones(3))))
    with pytest.raises(NonFiniteLoss, match="All heads have left.*optim.optimizer.lr"):
        validate(Engine("cpu", "fp32", workers=0))


def test_head_with_non_finite_loss_leaves_and_others_train(train, caplog):
    heads = {"a": ((1,), LinearHead), "b": ((0,), Failing)}
    run = train("both", heads=heads)
    both, alone = best_of_head(run, "a"), best_of_head(train("one", heads={"a": heads["a"]}), "a")
    assert both.keys() == alone.keys() and all(torch.equal(value, alone[key]) for key, value in both.items())
    assert caplog.text.count("b: left the training at step 3, where its loss or gradient was not finite") == 1
    assert run.model.left_heads() == {"b": 2}
    assert bests_of(run)["b"] == 2 and [row["step"] for row in run.rows if "val/b/miou" in row] == [2]
    losses = [row["train/b/loss"] == row["train/b/loss"] for row in run.rows if "train/loss" in row]
    assert losses == [True, True, False, False, False, False]
    with pytest.raises(NonFiniteLoss, match="Step 3: the loss is nan"):  # once no head is left
        train("none", heads={"a": heads["b"]})
    assert read(run.folder.parent / "none/last.safetensors").info["progress"]["step"] == 2
    again = train("both", start=True, steps=8, heads=heads)
    assert again.model.left_heads() == {"b": 2} and bests_of(again)["b"] == 2
    assert not [row for row in again.rows if "val/b/miou" in row]


def validated(*scores):
    """Return data whose validations have these scores of two heads."""
    found = iter(scores)

    class Scored(MultiHeadDataModule):
        def validate(self, *_):
            first, second = next(found)
            return Validation({"a/miou": first, "b/miou": second, "miou": max(first, second)}, {})

    return Scored


def test_each_head_has_a_best_step_and_patience_uses_the_best(train):
    run = train("scored", data=validated((0.1, 0.3), (0.2, 0.2), (0.25, 0.1)), patience=1)
    bests = bests_of(run)
    assert bests == {"a": 4, "b": 2}
    progress = read(run.folder / "last.safetensors").info
    assert progress["progress"]["best_step"] == 2 and progress["progress"]["step"] == 4
    assert {name: head["progress"]["best_step"] for name, head in progress["heads"].items()} == bests
    assert not (run.folder / "best.safetensors").exists()


def test_resume_by_another_score_discards_best_of_each_head(train):
    falling = validated(*((score, score) for score in (0.4, 0.3, 0.2, 0.1)))
    train("run", data=falling)
    info = {**INFO, "config": {**INFO["config"], "trainer": {"score": "dice"}}}
    again = train("run", start=True, data=falling, info=info, steps=8)
    assert bests_of(again) == {"a": 8, "b": 8}


def test_the_best_of_the_heads_is_finite_where_any_is():
    def best(*values, lowest):
        return best_of([{"x": value} for value in values], "x", lowest=lowest)["x"]

    assert best(0.2, None, torch.nan, 0.5, lowest=False) == 0.5
    assert best(2.0, torch.inf, 1.0, lowest=True) == 1.0
    assert math.isnan(best(None, torch.nan, lowest=True))
    assert best(None, lowest=True) is None


def test_head_with_fewest_infinite_images_is_the_best(shared_parts, tmp_path):
    def head_scores(infinite, mean):
        return {"x": None if infinite else mean, "x_infinite_images": infinite, "x_finite_mean": mean}

    heads = [head_scores(3.0, 1.0), head_scores(2.0, 9.0), head_scores(2.0, 8.0)]
    assert best_of(heads, "x", lowest=True) is heads[2]
    assert best_of([*heads, head_scores(0.0, 99.0)], "x", lowest=True)["x"] == 99.0
    model = shared_parts.model(a=((1,), LinearHead))
    none = Checkpointer(tmp_path / "none", dict(INFO))
    checkpoints = MultiHeadCheckpointer(tmp_path, dict(INFO), heads={"a": none})
    checkpoints.save_if_best(model, {"a/loss": torch.nan, "loss": 0.5}, "loss", lowest=True)
    assert none.progress.best is None and not none.best.exists(), "a score that is not finite is no best"
    for mean in (8.0, None):  # None: all images are infinite
        head = Checkpointer(tmp_path / str(mean), dict(INFO))
        checkpoints = MultiHeadCheckpointer(tmp_path, dict(INFO), heads={"a": head}, progress=Progress(4))
        scores = head_scores(2.0, mean)
        scores |= {f"a/{key}": value for key, value in scores.items()}
        found = checkpoints.save_if_best(model, scores, "x", lowest=True)
        assert found == head.progress == Progress(4, best=mean, best_infinite=2, best_step=4) and head.best.exists()


def test_logged_infinite_images_are_those_of_the_best_head(train):
    class Scored(MultiHeadDataModule):
        def __post_init__(self):
            self.score_names = self.lowest = ("x", "x_infinite_images", "x_finite_mean")

        def validate_each(self, *_, **__):
            values = {"a": (2.0, 1.0), "b": (1.0, 9.0)}.values()
            return [Validation(dict(zip(self.score_names, (None, *each), strict=True)), {}) for each in values]

    run = train("infinite", data=Scored, score="x", steps=2)
    (row,) = (row for row in run.rows if "val/x" in row)
    assert (row["val/x"], row["val/x_infinite_images"], row["val/x_finite_mean"]) == (None, 1.0, 9.0)
