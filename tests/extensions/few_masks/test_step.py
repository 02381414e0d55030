"""A step of FixMatch and UniMatch V2, beside a plain one in float64 that follows the paper."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import INFO
from log_rows import Rows
from small_trainings import segmenter, values_of

from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Batch
from dinoseg.extensions.few_masks.loss import FewMasksLoss
from dinoseg.extensions.few_masks.ohem import Improbable, OhemCrossEntropy
from dinoseg.extensions.few_masks.teacher import EmaTeacher, FewMasksBatch, TeacherAverage, draw_dropout
from dinoseg.extensions.few_masks.views import UnlabelledBatch, draw_box, draw_strong_view
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import trained_names
from dinoseg.training.checkpoint import Checkpointer
from dinoseg.training.engine import Engine
from dinoseg.training.optim import MovingAverage, adamw, schedule, tensors_of
from dinoseg.training.trainer import Settings, TrainingSetup, fit
from dinoseg.utils.errors import UserError

SIZE = (16, 24)
STEPS = 4


class Feed:
    """Given batches as a data module without validation."""

    seed, score_names, lowest, remedy, epoch = 0, ("loss",), ("loss",), "", 1.0
    train = val = range(9)

    def __init__(self, batches):
        self.batches = batches

    def train_batches(self, start):
        return iter(self.batches[start:])

    def step_scores(self, engine):
        return None


def draw_batches(rng, images, views):
    """Return drawn images with masks, and views without, of some steps; half of the images have padding."""
    generator = torch.Generator().manual_seed(int(rng.integers(1000)))

    def draw(*shape):
        return torch.rand(*shape, *SIZE, generator=generator, dtype=torch.float64)

    for _ in range(STEPS):
        mask = (3 * draw(images)).long().where(draw(images) > 0.2, 255).to(torch.uint8)
        padding = torch.zeros(images, *SIZE, dtype=torch.bool)
        padding[::2, int(rng.integers(1, SIZE[0])) :] = True
        boxes = np.stack([[draw_box(SIZE, rng) for _ in range(views)] for _ in range(images)])
        truth = torch.full((images, *SIZE), 255, dtype=torch.uint8)
        names = [str(number) for number in range(images)]
        others = UnlabelledBatch(
            draw(images, 3), draw(images, views, 3), torch.from_numpy(boxes), padding, truth, names
        )
        yield Batch(draw(images, 3), mask, names), others


def plain_training(model, batches, dropout, threshold, cost):
    """Train by the formulas of UniMatch V2, without any part of the extension; return the losses and the teacher."""
    teacher = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.999), weight_decay=0.01)
    losses = []
    for step, (labelled, others) in enumerate(batches):
        with torch.no_grad():
            probabilities = upsample(teacher(others.weak).grid, SIZE, (1.0, 1.0)).softmax(1)
        confidence, ids = probabilities.max(1)
        parts = []
        for view in range(others.strong.shape[1]):
            image, label, sure, inside = (
                others.strong[:, view].clone(),
                ids.clone(),
                confidence.clone(),
                ~others.padding,
            )
            partner, (where, rows, columns) = len(ids) - 1 - torch.arange(len(ids)), others.boxes[:, view].nonzero().T
            source = partner[where]
            image[where, :, rows, columns] = others.strong[:, view][source, :, rows, columns]
            label[where, rows, columns] = ids[source, rows, columns]
            sure[where, rows, columns] = confidence[source, rows, columns]
            inside[where, rows, columns] = ~others.padding[source, rows, columns]
            maps = model.backbone.maps(image)
            if dropout is not None:
                maps = [each * dropout[step][view][:, :, None, None] for each in maps]
            costs = F.cross_entropy(upsample(model.head(maps), SIZE, (1.0, 1.0)), label, reduction="none")
            parts.append((costs * ((sure >= threshold) & inside)).sum() / inside.sum())
        supervised = cost(upsample(model(labelled.image).grid, SIZE, (1.0, 1.0)), labelled.mask.long())
        taught = sum(parts) / len(parts)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - max(0, step - 1) / (STEPS - 1)) ** 0.9
        optimizer.zero_grad()
        ((supervised + taught) / 2).backward()
        optimizer.step()
        decay = min(1 - 1 / (step + 1), 0.6)
        with torch.no_grad():
            for mean, weight in zip(teacher.parameters(), model.parameters(), strict=True):
                mean.copy_(decay * mean + (1 - decay) * weight)
        losses.append((supervised.item(), taught.item()))
    return losses, teacher


def plain_ohem(threshold, kept):
    """Return the cross-entropy over the pixels whose probability is small, by a sorted list."""

    def cost(scores, target):
        costs = F.cross_entropy(scores, target, ignore_index=255, reduction="none")
        known = target != 255
        if known.sum() < kept:
            return costs[known].mean()
        true = (-costs).exp()
        limit = sorted([*true[known].tolist(), *[1.0] * int((~known).sum())])[min(kept, true.numel()) - 1]
        return costs[known & (true <= max(threshold, limit))].mean()

    return cost


@pytest.mark.parametrize("case", range(10))
def test_steps_equal_a_plain_reference(case, tmp_path, monkeypatch):
    rng = np.random.default_rng(case)
    images, views = int(rng.integers(1, 5)), 1 + case % 2
    threshold, ohem = (0.0, 0.4, 0.6)[case % 3], [None, (0.3, 90), (0.5, 10**6)][case // 4]
    model = segmenter(lambda: LinearHead(24, 1, 3)).double().eval()
    torch.nn.init.normal_(model.head.classify.weight, std=0.3)
    plain, batches = copy.deepcopy(model), [*draw_batches(rng, images, views)]
    dropout = [draw_dropout(24, images) for _ in range(STEPS)] if views == 2 else None
    cost = plain_ohem(*ohem) if ohem else lambda scores, target: F.cross_entropy(scores, target, ignore_index=255)
    losses, teacher = plain_training(plain, batches, dropout, threshold, cost)

    monkeypatch.setattr(type(model), "train", lambda model, mode=True: model)  # this backbone's positions are random
    draws = iter(dropout or ())
    monkeypatch.setattr("dinoseg.extensions.few_masks.teacher.draw_dropout", lambda *_: next(draws))
    average = TeacherAverage(tensors_of(model, trained_names(model)), 0.6)
    engine, log = Engine("cpu", "fp32", workers=0), Rows()
    labels = EmaTeacher(model, average, engine, threshold, views == 2, 255)
    weights = torch.ones(3, dtype=torch.float64)
    masks = OhemCrossEntropy(weights, threshold=ohem[0], min_kept=ohem[1]) if ohem else CrossEntropy(weights)
    loss = FewMasksLoss(masks, 3, 255, views).double()
    feed = Feed([FewMasksBatch(labels, *batch) for batch in batches])
    optimizer = adamw(model, lr=0.1, weight_decay=0.01, weight_decay_on="all")
    rates = schedule("poly", warmup=1, warmup_start=1.0)
    settings = Settings(steps=STEPS, val_every=STEPS + 1, clip=None, score="loss", log_every=1)
    setup = (model, loss, feed, optimizer, rates, engine, Checkpointer(tmp_path, dict(INFO)), log, settings)
    monkeypatch.setattr("dinoseg.training.trainer.validate", lambda *_: None)
    fit(TrainingSetup(*setup, make_ema=lambda *_: average))
    found = [values_of(log.rows, f"train/{name}") for name in ("masks", "pseudo_labels")]
    np.testing.assert_allclose(np.transpose(found), losses, atol=1e-10)
    for (name, weight), mean in zip(plain.named_parameters(), teacher.parameters(), strict=True):
        np.testing.assert_allclose(model.get_parameter(name).detach(), weight.detach(), atol=1e-8)
        np.testing.assert_allclose(average.average[name], mean.detach(), atol=1e-8)


def test_teacher_decay_rises_from_zero_to_its_limit():
    average = TeacherAverage([], 0.996)
    assert [average.decay_at(step) for step in (0, 1, 3, 248, 249, 1000)] == [0, 0.5, 0.75, 1 - 1 / 249, 0.996, 0.996]
    assert MovingAverage([], 0.996).decay_at(0) == 0.1


def test_complementary_dropout_spares_half_of_the_images():
    for images in (1, 2, 5):
        first, second = draw_dropout(64, images)
        assert torch.equal(first + second, torch.full((images, 64), 2.0))
        spared = (first == 1).all(1)
        assert spared.sum() == images // 2 and {*first[~spared].unique().tolist()} == {0.0, 2.0}


def test_official_rates_need_one_more_step():
    factor, steps = schedule("poly", warmup=1, warmup_start=1.0), 39
    for step in range(steps):
        assert abs(factor(step, steps + 1) - (1 - max(0, step - 1) / steps) ** 0.9) < 1e-14


def test_accumulated_batches_have_the_loss_of_each_pixel():
    """The sums of two batches are divided by the pixels of both."""
    rng, model = np.random.default_rng(1), segmenter().eval()
    engine = Engine("cpu", "fp32", workers=0)
    labels = EmaTeacher(model, TeacherAverage(model.named_parameters(), 0.9), engine, 0.0, False, 255)
    loss = FewMasksLoss(CrossEntropy(torch.ones(3)), 3, 255, 2)
    batches = [FewMasksBatch(labels, *batch) for batch in draw_batches(rng, 2, 2)][:2]
    for batch in batches:
        batch.labelled.image, batch.unlabelled.weak = batch.labelled.image.float(), batch.unlabelled.weak.float()
        batch.unlabelled.strong = batch.unlabelled.strong.float()
    divisors = sum(loss.divisors(batch) for batch in batches)
    total, wanted = 0.0, torch.zeros(3)
    for batch in batches:
        student = batch.to(engine.device)
        prediction = model.eval()(student.image)
        part, _, parts = loss.step_loss(prediction, student, divisors)
        total = total + part
        known = torch.cat([student.mask[:2], *student.targets])
        costs = F.cross_entropy(prediction.scores(), known.long(), ignore_index=255, reduction="none")
        wanted += torch.stack([part.sum() for part in costs.split(2)])
        own = torch.stack([part.sum() for part in costs[2:].split(2)]) / student.counted
        assert parts["pseudo_labels"].item() == pytest.approx(own.mean().item(), rel=1e-5)
    masks, *views = (wanted / divisors).tolist()
    assert total.item() == pytest.approx((masks + sum(views) / 2) / 2, rel=1e-5)


def test_teacher_labels_from_the_threshold_on_in_evaluation_mode():
    """A probability of 1 passes a threshold of 1; the student is in training mode afterwards."""
    model, engine, passes = segmenter().train(), Engine("cpu", "bf16", workers=0), []
    torch.nn.init.constant_(model.head.classify.bias[1:], -1e4)
    model.head.register_forward_pre_hook(lambda *_: passes.append((model.training, torch.is_autocast_enabled("cpu"))))
    labels = EmaTeacher(model, TeacherAverage(model.named_parameters(), 0.9), engine, 1.0, False, 255)
    labelled, others = next(draw_batches(np.random.default_rng(0), 2, 1))
    labelled.image, others.weak, others.strong = labelled.image.float(), others.weak.float(), others.strong.float()
    student = labels.complete(labelled, others)
    assert passes == [(False, True)] and model.training
    assert student.facts["confident"] == 1 and torch.equal(student.targets[0] == 255, others.mix(others.padding, 0))


def test_ohem_selects_up_to_the_threshold_and_the_least():
    true = torch.tensor([[[0.125, 0.25, 0.5, 0.75, 0.9, torch.nan, 0.1]]], dtype=torch.float64)
    labelled = torch.tensor([[[True] * 6 + [False]]])
    for kept, wanted in ((1, "1110010"), (4, "1111010"), (5, "1111110"), (7, "1111110")):
        threshold = (true.log()).exp()[0, 0, 2].item()
        selected = Improbable(threshold=threshold, min_kept=kept).select_pixels(-true.log(), labelled)
        assert "".join(map(str, selected[0, 0].int().tolist())) == wanted


def test_wrapped_loss_has_the_properties_of_the_loss_on_masks():
    own = OhemCrossEntropy(torch.ones(3))
    own.needs = frozenset({"masks"})
    loss = FewMasksLoss(own, 3, 255, 2)
    assert (loss.needs, loss.sums_over_batch, loss.num_divisors) == (own.needs, True, 3)


def test_boxes_have_the_official_areas_and_ratios():
    boxes = [draw_box((100, 200), np.random.default_rng(number)) for number in range(400)]
    found = np.array([(np.ptp(rows) + 1, np.ptp(columns) + 1) for rows, columns in map(np.nonzero, boxes) if len(rows)])
    shares = found / (100, 200)
    assert 160 < len(found) < 240
    assert 0.01 < shares.prod(1).min() < 0.03 and 0.35 < shares.prod(1).max() <= 0.4
    assert 0.25 < (shares[:, 0] / shares[:, 1]).min() and (shares[:, 0] / shares[:, 1]).max() < 4


def test_strong_views_change_colours_only_of_the_first_channels():
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    seen = [draw_strong_view(image, np.random.default_rng(number)) for number in range(60)]
    assert all(view.shape == image.shape and view.dtype == np.uint8 for view in seen)
    kept = [view for view in seen if np.array_equal(view[..., 3], image[..., 3])]
    assert 20 < len(kept) < 40  # the others are blurred
    greys = [np.array_equal(view[..., 0], view[..., 1]) and np.array_equal(view[..., 0], view[..., 2]) for view in seen]
    assert 4 < sum(greys) < 22 and 2 < sum(np.array_equal(view, image) for view in seen) < 14
    for wrong in (image[..., :2], image.astype(np.uint16)):
        with pytest.raises(UserError, match="RGB images of 8 bits"):
            draw_strong_view(wrong, np.random.default_rng(0))
