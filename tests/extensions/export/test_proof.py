"""Verification of exports: pixels and scores are counted, and NaN is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
from command_line import write_data

from dinoseg.extensions.export import proof
from dinoseg.extensions.export.options import GraphOptions
from dinoseg.extensions.export.pictures import Picture
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids

SIZE = (32, 48)


def fixed(ids, probabilities, size=None, predicted=None):
    """Return a model that gives the same class ids and probabilities for each picture."""
    return SimpleNamespace(
        record=SimpleNamespace(size=size),
        ids=lambda images: ids[None],
        probabilities=lambda images: probabilities[None],
        predict_ids=lambda image: predicted,
    )


@pytest.fixture
def picture(tmp_path):
    """Return a picture with its mask of two classes."""
    write_data(tmp_path, val=1)
    return Picture(tmp_path / "val/images/0.png", "0", SIZE, mask=read_ids(tmp_path / "val/masks/0.png").copy())


def test_proof_counts_pixels_points_and_predictions(picture):
    ids = picture.mask.copy()
    half = np.full((2, *SIZE), 0.5, np.float32)
    given = ids.copy()
    given[0, :24] = 1 - given[0, :24]  # 24 of 1,536 pixels
    predicted = given.copy()
    predicted[:8] = 1 - predicted[:8]  # 384 of them
    moved = half + np.float32([0.25, 0])[:, None, None]

    answer = fixed(given, moved)
    result = proof.compare(fixed(ids, half, SIZE, predicted), answer, [picture], 2, 255)
    assert result["agreement"] == 1 - 24 / 1536 and result["agreement_with_predict"] == 0.75
    assert result["miou"]["torch"] == 1 and 0.9 < result["miou"]["exported"] < 1 and result["pixels"] == 1536
    assert result["largest_difference_of_probabilities"] == 0.25 and result["latency_ms"]["exported"] > 0
    assert result["references"] == "masks of the data set"
    alone = proof.compare(fixed(given, half), answer, [Picture(picture.path, "0", SIZE)], 2, 255)
    assert "agreement_with_predict" not in alone and alone["references"] == "the trained model's own classes"
    assert alone["agreement"] == alone["miou"]["exported"] == alone["miou"]["torch"] == 1


def test_proof_limits_follow_the_options():
    result = {"finite": True, "agreement": 0.999, "miou": {"torch": 0.5, "exported": 0.4990625}}
    assert proof.meets_limits(result, GraphOptions())
    assert proof.meets_limits(result, GraphOptions(max_miou_drop=100 * (0.5 - 0.4990625)))
    assert not proof.meets_limits(result, GraphOptions(min_agreement=0.9991))
    assert not proof.meets_limits(result, GraphOptions(max_miou_drop=0.09))
    assert not proof.meets_limits({**result, "finite": False}, GraphOptions())


def test_nan_outputs_fail_the_proof(picture):
    zeros = np.zeros(SIZE, np.uint8)
    nan = np.full((2, *SIZE), np.nan, np.float32)
    with pytest.raises(UserError, match=r"0.png: the trained model's own probabilities are NaN"):
        proof.compare(fixed(zeros, nan), SimpleNamespace(), [picture], 2, 255)
    fine = np.full((2, *SIZE), 0.5, np.float32)
    given = iter([nan, fine])  # of the first of two pictures alone
    runtime = SimpleNamespace(ids=lambda _: zeros[None], probabilities=lambda _: next(given)[None])
    result = proof.compare(fixed(zeros, fine), runtime, [picture] * 2, 2, 255)
    assert result["agreement"] == 1 and result["largest_difference_of_probabilities"] is None
    assert not proof.meets_limits(result, GraphOptions())


def test_large_probabilities_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(proof, "MAX", 100)
    values = np.arange(2 * 20 * 30, dtype=np.float32).reshape(2, 20, 30)
    thin = proof.subsample(values)
    assert thin.size <= 100 and (thin == values[:, ::4, ::4]).all()
    assert proof.subsample(values[:, :5, :5]).shape == (2, 5, 5)
