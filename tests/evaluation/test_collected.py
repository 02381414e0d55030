from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dinoseg.core.geometry import lattice
from dinoseg.core.shapes import Batch
from dinoseg.evaluation import collected as collected_module
from dinoseg.evaluation.collected import SHOWN, Collector, image_mious, join
from dinoseg.evaluation.scoring.intervals import unit_sums
from dinoseg.evaluation.unit_scores import ClassScores
from dinoseg.metrics.confusion import ConfusionMatrix
from dinoseg.training.rendezvous import decode_message, encode_message

SIZE = (40, 52)
CLASSES = 4


class Data(SimpleNamespace):
    def __len__(self):
        return self.images


def samples(count, *, ignored=0.2, seed=0):
    """Yield an image, its mask, what is predicted of it and logits on its lattice; each image errs another share."""
    draw = np.random.default_rng(seed)
    for index in range(count):
        mask = np.where(draw.random(SIZE) < ignored, 255, draw.integers(0, CLASSES, SIZE))
        wrong = draw.random(SIZE) < (index + 1) / (count + 1)
        prediction = np.where(wrong, draw.integers(0, CLASSES, SIZE), mask % CLASSES)
        image = draw.integers(0, 256, (3, *SIZE))
        places = torch.zeros(SIZE)[lattice(SIZE)].shape
        tensors = [torch.from_numpy(each).to(torch.uint8) for each in (image, mask, prediction)]
        yield *tensors, torch.from_numpy(draw.normal(size=(CLASSES, *places))).float()


def collect(images, world_size=1, ignore_index=255):
    data = Data(images=len(images), classes=["a", "b", "c", "d"], ignore_index=ignore_index)
    parts = []
    for rank in range(world_size):
        collector = Collector(data, rank, world_size)
        for image, mask, prediction, logits in images[rank::world_size]:
            collector.add(Batch(image[None], mask[None], ["x"]), prediction[None], logits[None])
        parts += decode_message(encode_message(collector.parts))
    return join(parts)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_collects_the_same(world_size):
    images = list(samples(17))
    one, several = collect(images), collect(images, world_size)
    for name in ("classes", "boundary", "logits", "labels"):
        assert np.array_equal(getattr(one, name), getattr(several, name)), name
    for name in ("best", "worst"):
        assert [shot.index for shot in getattr(one, name)] == [shot.index for shot in getattr(several, name)]
    scores = image_mious(one.classes)
    order = sorted(range(17), key=lambda index: scores[index])
    assert [shot.index for shot in one.worst] == order[:SHOWN]
    assert [shot.index for shot in one.best] == order[::-1][:SHOWN]


@pytest.mark.parametrize("ignored", [255, 0, 1])
def test_counts_are_those_of_the_confusion_matrix(ignored):
    images = list(samples(5, ignored=0.2 if ignored == 255 else 0))
    found = collect(images, ignore_index=ignored)
    whole = ConfusionMatrix(CLASSES, ignored, background=1)
    for _, mask, prediction, _ in images:
        whole.update(prediction, mask)
    counts = found.classes.sum(axis=0)
    expected = whole.compute()
    scores = ClassScores(CLASSES, background=1).scores(counts.reshape(-1))
    means = ("miou", "miou_no_background", "dice", "accuracy")
    assert [scores[key] for key in means] == pytest.approx([expected[key] for key in means], rel=1e-12)
    for place, key in ((1, "pixels"), (2, "predicted_pixels")):
        assert counts[place].tolist() == [0 if row["id"] == ignored else row[key] for row in expected["classes"]]
    ious = [np.nan if row["iou"] is None else row["iou"] for row in expected["classes"]]
    assert [scores[f"iou/{index}"] for index in range(CLASSES)] == pytest.approx(ious, rel=1e-12, nan_ok=True)
    assert found.boundary[..., 0].sum() == expected["pixels"]
    assert found.boundary[..., 1].sum() == round((1 - expected["accuracy"]) * expected["pixels"])


def test_collected_logits_are_those_of_labelled_pixels(monkeypatch):
    images = list(samples(3))
    found = collect(images)
    masks = [mask[lattice(SIZE)].numpy() for _, mask, _, _ in images]
    logits = [each.numpy()[:, mask != 255].T for (_, _, _, each), mask in zip(images, masks, strict=True)]
    assert np.array_equal(found.labels, np.concatenate([mask[mask != 255] for mask in masks]))
    assert np.array_equal(found.logits, np.concatenate(logits))
    monkeypatch.setattr(collected_module, "_LOGITS", 6 * CLASSES * 3)  # those of many images take no more memory
    found = collect(images)
    assert len(found.labels) == 18 and found.logits.shape == (18, CLASSES)


def test_few_images_stand_once_and_those_without_labels_nowhere():
    bare = list(samples(2, ignored=1.1))
    found = collect([*bare, *samples(1)])
    assert [shot.index for shot in found.best] == [2] and not found.worst
    assert image_mious(found.classes)[:2] == [None, None] and len(collect(bare).labels) == 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_images_that_score_the_same_stand_once_the_earlier_ones(world_size):
    image, mask, prediction, logits = next(samples(1))
    found = collect([(image, mask, prediction, logits)] * 17, world_size)
    assert [shot.index for shot in found.best] == [0, 1, 2] and [shot.index for shot in found.worst] == [3, 4, 5]
    found = collect([*samples(8), *[(image, mask, mask, logits)] * 8], world_size)
    assert [shot.index for shot in found.best] == [8, 9, 10, 11, 12, 13]


def test_counts_are_added_by_unit():
    counts = collect(list(samples(12))).classes
    sums = unit_sums(counts, [str(n % 4) for n in range(12)])
    assert np.array_equal(sums[1].reshape(3, CLASSES), counts[1::4].sum(axis=0))
