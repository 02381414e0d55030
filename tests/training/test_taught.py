"""What a teacher's labels are, and what they cost, written out pixel by pixel."""

import math

import pytest
import torch

from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.overlap import Dice
from dinoseg.training.self_training_batch import MixedBatch, SelfTrainingBatch, SelfTrainingLoss

K, V = 3, 2


def predicted(scores):
    """Return a prediction whose scores are given at the images' own size."""
    size = scores.shape[-2], scores.shape[-1]
    return Prediction(scores, size, (1.0, 1.0), lambda outputs, size, valid: outputs)


def both(criterion, weight=1.0):
    """Return one loss of masks and of views."""
    return SelfTrainingLoss(criterion, criterion, weight)


def mixed(labelled, unlabelled, size=(5, 6), threshold=0.6, ignore=255, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def ids(*shape, high):
        return torch.randint(0, high, shape, generator=draw)

    outside = torch.where(ids(unlabelled, *size, high=5) == 0, ignore, int(ignore == 0)).to(torch.uint8)
    top, left = ids(unlabelled, V, high=size[0]), ids(unlabelled, V, high=size[1])
    boxes = torch.stack([top, left, top + ids(unlabelled, V, high=4), left + 2], dim=-1)
    return MixedBatch(
        ids(labelled, 3, *size, high=256).to(torch.uint8),
        ids(labelled, *size, high=K).to(torch.uint8),
        [f"im{n}" for n in range(labelled)],
        ids(unlabelled, 3, *size, high=256).to(torch.uint8),
        outside,
        ids(unlabelled, V, 3, *size, high=256).to(torch.uint8),
        boxes,
        threshold,
        ignore,
    )


def teacher(images):
    """Return scores that depend on each pixel of the image it is given."""
    pixels = images.double()
    return predicted(torch.stack([pixels[:, k] / 90 for k in range(K)], dim=1))


@pytest.mark.parametrize(("labelled", "unlabelled", "ignore"), [(2, 3, 255), (1, 1, 255), (2, 4, 0)])
def test_views_are_labelled_where_the_teacher_is_sure_and_boxes_bring_their_labels(labelled, unlabelled, ignore):
    batch = mixed(labelled, unlabelled, ignore=ignore)
    with_labels = batch.with_labels(teacher)
    assert isinstance(with_labels, SelfTrainingBatch) and with_labels.names == batch.names
    assert with_labels.count == batch.count == labelled + unlabelled * V
    assert (with_labels.labelled.image == batch.image).all() and (with_labels.labelled.mask == batch.mask).all()
    inside, kept = 0, 0
    for u in range(unlabelled):
        for v in range(V):
            top, left, bottom, right = batch.boxes[u, v].tolist()
            for row in range(5):
                for column in range(6):
                    source = u - 1 if top <= row < bottom and left <= column < right else u
                    values = [math.exp(value / 90) for value in batch.weak[source, :, row, column].tolist()]
                    best = max(range(K), key=lambda k: values[k])
                    beyond = batch.outside[source, row, column] == ignore
                    wanted = ignore if beyond or values[best] / sum(values) < 0.6 else best
                    inside, kept = inside + int(not beyond), kept + int(wanted != ignore)
                    at = u * V + v
                    assert with_labels.views.mask[at, row, column] == wanted
                    assert (
                        with_labels.views.image[at, :, row, column] == batch.strong[source, v, :, row, column]
                    ).all()
    assert with_labels.inside == inside and 0 < kept < inside


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("criterion", [CrossEntropy, Dice])
def test_the_loss_is_that_of_masks_and_a_mean_over_all_pixels_of_the_views(criterion, weight):
    with_labels = mixed(2, 3).with_labels(teacher)
    with_labels.mask[0] = 255
    weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    scores = torch.randn(with_labels.count, K, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    even = torch.tensor([1.0, 1.5, 1.0], dtype=torch.float64)
    loss = SelfTrainingLoss(criterion(weights), criterion(even), weight)
    value, parts = loss(predicted(scores), with_labels)
    own = criterion(weights)(predicted(scores[:2]), with_labels.labelled)[0]
    views = criterion(even)(predicted(scores[2:]), with_labels.views)[0]
    share = int((with_labels.views.mask != 255).sum()) / int(with_labels.inside)
    assert parts["sure"].item() == pytest.approx(share, abs=1e-6) and 0 < share < 1
    assert value.item() == pytest.approx((own + weight * views * share).item(), rel=1e-6)
    if criterion is CrossEntropy:
        mask, logs = with_labels.views.mask.long(), scores[2:].log_softmax(dim=1)
        sums = [0.0, 0.0]
        for at, k in ((at, mask[tuple(at)].item()) for at in (mask != 255).nonzero().tolist()):
            sums[0] -= (even[k] * logs[at[0], k, at[1], at[2]]).item()
            sums[1] += even[k].item()
        assert parts["unlabelled"].item() == pytest.approx(sums[0] / sums[1] * share, rel=1e-6)


def test_a_teacher_that_is_never_sure_changes_nothing_and_validation_asks_the_loss_alone():
    with_labels = mixed(2, 3, threshold=0.9999).with_labels(teacher)
    scores = torch.randn(with_labels.count, K, 5, 6, requires_grad=True)
    criterion = CrossEntropy(torch.ones(K))
    value, parts = both(criterion)(predicted(scores), with_labels)
    value.backward()
    assert parts["sure"] == 0 and scores.grad[:2].abs().sum() > 0 and scores.grad[2:].abs().sum() == 0
    plain = Batch(with_labels.image, with_labels.mask, [""] * with_labels.count)
    of_views = CrossEntropy(torch.tensor([5.0, 0.1, 1.0]))
    alone, of_plain = SelfTrainingLoss(criterion, of_views, 1.0)(predicted(scores), plain)
    assert alone == criterion(predicted(scores), plain)[0] and "sure" not in of_plain


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_class_of_the_least_probability_is_learnt_and_of_less_it_is_not(kind):
    scores = torch.tensor([0.0, 0.0, -50.0], dtype=kind)[:, None, None].expand(2, K, 5, 6)  # a half each
    for threshold, learnt in ((0.5, True), (0.5005, False)):
        with_labels = mixed(1, 2, threshold=threshold).with_labels(lambda _: predicted(scores))
        assert bool((with_labels.views.mask != 255).any()) == learnt
    scores = torch.tensor([1.0, 0.0, -50.0], dtype=kind)[:, None, None].expand(2, K, 5, 6)  # 0.7311, in bfloat16 0.7305
    assert (mixed(1, 2, threshold=0.731).with_labels(lambda _: predicted(scores)).views.mask != 255).any()


def test_views_that_show_no_pixel_of_an_image_cost_nothing():
    batch = mixed(2, 3)
    batch.outside[:] = 255
    with_labels = batch.with_labels(teacher)
    scores = torch.randn(with_labels.count, K, 5, 6, generator=torch.Generator().manual_seed(1))
    value, parts = both(CrossEntropy(torch.ones(K)))(predicted(scores), with_labels)
    assert parts["sure"] == 0 and parts["unlabelled"] == 0 and value.isfinite()


def test_what_the_loss_of_masks_needs_is_asked_for():
    assert not both(CrossEntropy(torch.ones(K))).sums_over_batch
    assert both(Dice(torch.ones(K))).sums_over_batch


def test_both_losses_go_to_the_device():
    moved = SelfTrainingLoss(CrossEntropy(torch.ones(K)), Dice(torch.ones(K)), 1.0).to("meta")
    assert moved.criterion.weight.is_meta and moved.of_views.weight.is_meta


def test_all_of_a_batch_goes_to_the_device():
    moved = mixed(1, 2).to(torch.device("meta"))
    assert all(value.is_meta for value in vars(moved).values() if isinstance(value, torch.Tensor))


def test_a_batch_whose_masks_ignore_all_is_taught_all_the_same():
    with_labels = mixed(2, 3).with_labels(teacher)
    scores = torch.randn(with_labels.count, K, 5, 6, generator=torch.Generator().manual_seed(1))
    with_labels.mask[:2] = 255
    value, parts = both(CrossEntropy(torch.ones(K)))(predicted(scores), with_labels)
    assert value == parts["unlabelled"] > 0
    loss = both(CrossEntropy(torch.ones(K)))
    part, alone, _ = loss.step_loss(
        predicted(scores), with_labels, torch.stack([torch.tensor(0.0), 2.0 * with_labels.inside])
    )
    assert alone == value and part.item() == pytest.approx(value.item() / 2)
    assert both(CrossEntropy(torch.ones(K)), 0.0)(predicted(scores), with_labels)[1]["weight"] == 0


def test_parts_hold_each_image_once():
    batch = mixed(3, 2)
    parts = batch.split(3)
    assert [part.names for part in parts] == [["im0"], ["im1"], ["im2"]]
    assert torch.equal(torch.cat([part.weak for part in parts]), batch.weak) and len(parts[2].weak) == 0
    assert type(parts[2].with_labels(teacher)) is Batch  # nothing to teach
    moved = batch.to(torch.device("cpu"))
    assert all(torch.equal(getattr(moved, name), getattr(batch, name)) for name in ("image", "weak", "strong", "boxes"))
