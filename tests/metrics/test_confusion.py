import json

import numpy as np
import pytest
import torch
from mistakes import assert_refused
from score_making import mean

from dinoseg.metrics.confusion import SCORES, ConfusionMatrix, commonest_class


def loop_matrix(prediction, mask, num_classes, ignore_index):
    matrix = [[0] * num_classes for _ in range(num_classes)]
    for predicted, reference in zip(np.ravel(prediction), np.ravel(mask), strict=True):
        if reference != ignore_index:
            matrix[reference][predicted] += 1
    return matrix


def loop_class(prediction, mask, index, ignore_index):
    """Return a class's scores by sets of pixel positions, without any matrix; none for an ignored class."""
    counted = {i for i, value in enumerate(np.ravel(mask)) if value != ignore_index}
    ours = {i for i, value in enumerate(np.ravel(prediction)) if value == index} & counted
    theirs = {i for i, value in enumerate(np.ravel(mask)) if value == index} & counted
    both = len(ours & theirs)

    def share(part, whole):
        return None if whole == 0 else part / whole

    scores = {
        "iou": share(both, len(ours | theirs)),
        "dice": share(2 * both, len(ours) + len(theirs)),
        "precision": share(both, len(ours)),
        "recall": share(both, len(theirs)),
        "pixels": len(theirs),
        "predicted_pixels": len(ours),
    }
    return scores | ({"iou": None, "dice": None, "precision": None} if index == ignore_index else {})


CASES = {
    "plain": ((2, 7, 9), 4, 255, [0, 1, 2, 3], [0, 1, 2, 3, 255]),
    "absent classes": ((1, 5, 5), 9, 255, [0, 3], [3, 8]),
    "predicted only": ((1, 4, 6), 3, 255, [0, 2], [0]),
    "reference only": ((1, 4, 6), 3, 255, [0], [0, 2]),
    "all ignored": ((2, 3, 3), 3, 255, [0, 1], [255]),
    "no images": ((0, 3, 3), 3, 255, [0], [0]),
    "no pixels": ((2, 0, 3), 3, 255, [0], [0]),
    "one pixel": ((1, 1, 1), 2, 255, [1], [1]),
    "one class": ((1, 6, 2), 1, 255, [0], [0, 255]),
    "ignore inside the ids": ((3, 4, 4), 5, 2, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    "wide and many": ((1, 1, 400), 255, 255, list(range(255)), list(range(256))),
}


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.uint8) for case in CASES), ("plain", torch.int32), ("plain", torch.int64)]
)
def test_equals_a_loop_over_pixels(case, dtype):
    shape, num_classes, ignore, predicted_ids, mask_ids = CASES[case]
    rng = np.random.default_rng(7)
    prediction = rng.choice(predicted_ids, shape)
    mask = rng.choice(mask_ids, shape)
    confusion = ConfusionMatrix(num_classes, ignore, background=0)
    confusion.update(torch.from_numpy(prediction).to(dtype), torch.from_numpy(mask).to(dtype))
    scores = confusion.compute()

    expected = loop_matrix(prediction, mask, num_classes, ignore)
    assert confusion.matrix.dtype == torch.int64
    assert confusion.matrix.tolist() == expected == scores["matrix"]
    by_class = [loop_class(prediction, mask, index, ignore) for index in range(num_classes)]
    for index, (got, want) in enumerate(zip(scores["classes"], by_class, strict=True)):
        assert got == {"id": index, **want}
    assert scores["miou"] == pytest.approx(mean([row["iou"] for row in by_class]), abs=1e-14)
    assert scores["miou_no_background"] == pytest.approx(mean([row["iou"] for row in by_class[1:]]), abs=1e-14)
    assert scores["dice"] == pytest.approx(mean([row["dice"] for row in by_class]), abs=1e-14)
    assert scores["mean_accuracy"] == pytest.approx(mean([row["recall"] for row in by_class]), abs=1e-14)
    counted = mask != ignore
    assert scores["pixels"] == counted.sum()
    assert scores["ignored_pixels"] == (~counted).sum()
    right = float(np.mean(prediction[counted] == mask[counted])) if counted.any() else None
    assert scores["accuracy"] == pytest.approx(right, abs=1e-14)
    assert scores["present_classes"] == len((set(prediction[counted]) | set(mask[counted])) - {ignore})
    assert scores.get("ignored_class") == (ignore if ignore < num_classes else None)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_commonest_class_baseline_has_its_own_score():
    mask = torch.tensor([[[1, 1, 1, 0, 2, 255]]])
    confusion = ConfusionMatrix(4)
    confusion.update(torch.ones_like(mask), mask)
    assert commonest_class(confusion.matrix.tolist()) == (1, confusion.compute()["miou"])
    assert commonest_class(ConfusionMatrix(2).matrix.tolist()) == (0, 0.0)


def test_sums_over_merges_equal_the_whole():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 6, (7, 5, 11), generator=generator)
    mask = torch.randint(0, 7, (7, 5, 11), generator=generator)
    mask[mask == 6] = 255
    whole = ConfusionMatrix(6)
    whole.update(prediction, mask)
    merged = ConfusionMatrix(6)
    for images in zip(prediction.split(3), mask.split(3), strict=True):
        part = ConfusionMatrix(6)
        part.update(*images)
        merged.merge(part)
    assert torch.equal(merged.counts, whole.counts)
    assert merged.compute() == whole.compute()
    merged.reset()
    assert merged.counts.sum() == 0 and merged.compute()["miou"] is None


def test_refused_pixels_are_not_counted():
    confusion = ConfusionMatrix(3)
    ids = torch.zeros(1, 4, 4, dtype=torch.uint8)
    for prediction, mask in ((ids, ids + 7), (ids + 5, ids)):
        with pytest.raises(ValueError, match="16 "):
            confusion.update(prediction, mask)
        assert not confusion.counts.any()
    confusion.update(ids, ids.to(torch.uint16))
    assert confusion.compute()["accuracy"] == 1 and confusion.compute()["pixels"] == 16
    confusion.counts[-2] = 1  # as on another device, where `update` cannot tell
    assert_refused(confusion.compute, "Correct the masks")


def test_an_accelerator_is_never_read_back_in_update():
    confusion = ConfusionMatrix(3)
    mask = torch.tensor([[[9]]])
    confusion.counts = confusion.counts.to("meta")
    confusion.update(torch.zeros_like(mask).to("meta"), mask.to("meta"))  # reading any value back would raise
    assert confusion.counts.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_the_same_and_is_not_waited_for():
    prediction, mask = torch.randint(0, 5, (2, 2, 64, 64)).unbind()
    here, there = ConfusionMatrix(5), ConfusionMatrix(5)
    there.counts = there.counts.cuda()
    here.update(prediction, mask)
    on_device = prediction.cuda(), mask.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there.update(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(here.counts, there.counts.cpu())


@pytest.mark.parametrize("background", [None, 0])
def test_names_of_scores_are_those_of_an_empty_matrix(background):
    scores = ConfusionMatrix(2, background=background).compute()
    own = [] if background is None else ["miou_no_background"]
    assert sorted(name for name, value in scores.items() if value is None) == sorted([*SCORES, *own])


def test_numbers_of_numpy_are_whole_numbers():
    matrix = ConfusionMatrix(np.uint8(20), np.uint8(255), np.int64(1))
    matrix.update(np.array([[0, 19, 1]]), np.array([[0, 19, 1]]))
    assert json.loads(json.dumps(matrix.compute()))["background"] == 1 and matrix.compute()["miou"] == 1
