"""Scores and losses of a data set, whole and in windows, and when memory did not suffice for a first try."""

import pytest
import torch
import torch.nn.functional as F
from making import Pictures
from small_trainings import segmenter

from dinoseg.core import shapes
from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import MaskOutputs, Prediction, WeightedMasks
from dinoseg.inference import auto
from dinoseg.inference.auto import Auto
from dinoseg.inference.windows import Windows, starts
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.overlap import Dice
from dinoseg.training.engine import Engine
from dinoseg.training.validation import evaluate

SIZE = (24, 40)

UNIFORM = Windows((16, 24), overlap=0.5, weights="uniform")


def evaluate_all(model, strategy):
    seen = []
    engine = Engine("cpu", precision="fp32", workers=0, eval_batch_size=2)
    parts = {"strategy": strategy, "loss": CrossEntropy(torch.ones(3))}
    scores = evaluate(model, Pictures([SIZE] * 2), engine, **parts, on_batch=lambda *given: seen.append(given))
    return scores, seen


def test_the_loss_of_windows_is_the_mean_over_windows():
    model = segmenter().eval()
    scores, [(batch, ids, logits)] = evaluate_all(model, UNIFORM)
    losses = []
    for top in starts(24, 16, 8):
        for left in starts(40, 24, 12):
            place = (..., slice(top, top + 16), slice(left, left + 24))
            with torch.no_grad():
                parts = model(batch.image[place]).logits()
            losses += [F.cross_entropy(parts[n : n + 1], batch.mask[place][n : n + 1].long()) for n in range(2)]
    assert scores["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert sum(map(sum, scores["matrix"])) == 2 * 24 * 40 and ids.shape == (2, *SIZE) and logits.shape == (2, 3, 24, 40)
    assert sum(scores["matrix"][index][index] for index in range(3)) == (ids == batch.mask).sum().item()


class Unlike(Pictures):
    """Of the first image most is not labelled, and classes lie elsewhere than in the second."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["mask"][2 * index :, 5 * index :] = (255, 1)[index]
        return sample


@pytest.mark.parametrize("loss", [CrossEntropy(torch.tensor([1.0, 0.1, 3.0])), Dice(torch.ones(3))], ids=["", "dice"])
@pytest.mark.parametrize("strategy", [None, UNIFORM], ids=["", "windows"])
def test_the_loss_is_the_mean_over_images_in_batches_of_any_size(loss, strategy):
    engines = [Engine("cpu", "fp32", workers=0, eval_batch_size=count) for count in (1, 2)]
    found = [
        evaluate(segmenter().eval(), Unlike([SIZE] * 2), engine, strategy=strategy, loss=loss) for engine in engines
    ]
    assert found[0].pop("loss") == pytest.approx(found[1].pop("loss"), rel=1e-5)
    assert found[0] == found[1]


def test_prediction_can_be_restricted_to_some_images():
    masks = WeightedMasks(torch.rand(3, 4, 2, 2), torch.rand(3, 4, 5))
    outputs = MaskOutputs(torch.rand(3, 4, 6), masks.logits, aux=[MaskOutputs(torch.rand(3, 4, 6), masks.logits)])
    one = Prediction(outputs, (8, 8), (1.0, 1.0), upsample, masks=masks).of_images(slice(1, 2))
    assert one.masks is not None and isinstance(one.outputs, MaskOutputs)
    pairs = [(one.masks.shares, masks.shares), (one.outputs.aux[0].class_logits, outputs.aux[0].class_logits)]
    assert all(torch.equal(mine, others[1:2]) for mine, others in pairs)
    told = Prediction({"maps": [torch.arange(3)], "steps": 2}, (8, 8), (1.0, 1.0), upsample).of_images(slice(2, 3))
    assert told.outputs == {"maps": [torch.tensor([2])], "steps": 2}


def test_mirrored_and_scaled_images_have_no_loss():
    for average in ("probabilities", "scores"):
        options = {"size": (16, 24), "overlap": 0.5, "weights": "uniform", "average": average}
        (plain, _), (all_, [(_, ids, _)]) = (
            evaluate_all(segmenter().eval(), Windows(**options, **more))
            for more in ({}, {"flips": "all", "scales": (1.0, 0.5)})
        )
        assert all_["loss"] == plain["loss"] and ids.shape == (2, *SIZE)


def test_attempt_out_of_memory_leaves_no_trace_in_scores(monkeypatch):
    monkeypatch.setattr(auto, "free_bytes", lambda device: 2**40)
    strategy = Auto((16, 24))
    model = segmenter().eval()
    tried = []

    def whole(grid, size, valid):
        tried.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(shapes, "class_ids", whole)
    scores, [(_, ids, _)] = evaluate_all(model, strategy)
    assert tried == [SIZE]
    monkeypatch.undo()
    expected, [(_, wanted, _)] = evaluate_all(segmenter().eval(), strategy.windows)
    assert scores["loss"] == expected["loss"] and torch.equal(ids, wanted)
