"""Objects of several models as one: each finds them by its own strategy, and the task fuses them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mistakes import assert_refused
from object_models import draw_image, make_predictor
from torch import nn

from dinoseg.extensions.ensembles.ensemble import TrainedEnsemble, describe_member
from dinoseg.extensions.ensembles.strategy import AveragedStrategy
from dinoseg.inference.objects import ObjectCollector
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.windows import Whole, Windows


def make_members():
    """Return predictors that find the same objects with other scores, the second by windows."""
    members = [make_predictor("instance"), make_predictor("instance", Windows((40, 40), overlap=0.5))]
    head = members[1].model.head
    forward = head.forward

    def doubt(features):
        outputs = forward(features)
        return replace(outputs, class_logits=outputs.class_logits - torch.tensor([0.0, 0.5, 0, 0]))

    head.forward = doubt
    return members


def of_objects(found):
    return [(mask.starts.tolist(), mask.ends.tolist()) for mask in found.masks], found.classes.tolist(), found.scores


@pytest.mark.parametrize("offload", [False, True])
def test_objects_of_members_are_fused(monkeypatch, offload):
    members, moves = make_members(), []
    images = [draw_image(seed=seed)[0] for seed in range(3)]
    apart = [member.predict(images) for member in members]
    strategy = AveragedStrategy(members, offload=offload)
    strategy.ids = {}
    ensemble = Predictor(members[0].model, members[0].device, members[0].autocast, strategy)
    to = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moves.append(self) or to(self, device))
    ensemble.predict(images[:1])  # whose ids are forgotten
    assert moves == [member.model for member in members for _ in range(1 + offload)]
    fused = ensemble.predict(images, probabilities=True)
    assert len(fused) == 3
    for number, found in enumerate(fused):
        own = [each[number].objects for each in apart]
        expected = members[0].model.task.fuse_objects(own)
        masks, labels, scores = of_objects(found.objects)
        assert (masks, labels) == of_objects(expected)[:2] and len(masks) >= 3
        np.testing.assert_array_equal(scores, expected.scores)
        assert not np.array_equal(scores, own[0].scores)
    shares = sum(member.probabilities(images).double() for member in members) / 2
    assert max((each.probabilities - share).abs().max() for each, share in zip(fused, shares, strict=True)) < 1e-6
    for number, each in enumerate(apart):
        assert np.array_equal(torch.cat(strategy.ids[number], dim=1), np.stack([found.ids for found in each]))


def test_objects_are_fused_at_the_size_that_is_asked():
    members = make_members()
    task, size = members[0].model.task, (30, 45)
    images = torch.from_numpy(draw_image()[0]).permute(2, 0, 1)[None]

    def find(predictor):
        collector = ObjectCollector(task, 1, size)
        predictor.run_bands(images, lambda bands: [*bands], size=size, on_pass=collector)
        return collector.objects()[0]

    found = find(Predictor(members[0].model, members[0].device, members[0].autocast, AveragedStrategy(members)))
    own = [find(member) for member in members]
    assert of_objects(found)[:2] == of_objects(task.fuse_objects(own))[:2] and found.size == size
    task.max_instances = 2
    assert of_objects(task.fuse_objects(own))[0] == of_objects(found)[0][:2]


def test_a_single_active_member_finds_its_own_objects():
    members = make_members()
    image = draw_image()[0]
    own = members[1].predict([image])[0].objects
    strategy = AveragedStrategy(members)
    strategy.active = [1]
    ensemble = Predictor(members[0].model, members[0].device, members[0].autocast, strategy)
    found = ensemble.predict([image])[0].objects
    assert of_objects(found)[:2] == of_objects(own)[:2]


def test_members_agree_in_things_and_find_no_segments():
    labels = SimpleNamespace(classes=["ground", "leaf", "stone"], ignore_index=255)
    facts = describe_member(make_predictor("instance").model, labels, {}, Whole())
    assert facts["things"] == [1, 2]
    segments = make_predictor("panoptic").model
    assert_refused(lambda: describe_member(segments, labels, {}, Whole()), "cannot fuse panoptic segments")
    assert describe_member(segments, labels, {}, Whole(), averages=False)["things"] == [1, 2]


def test_folds_of_panoptic_models_have_one_run():
    model = make_predictor("panoptic").model
    ensemble = SimpleNamespace(model=model, out_of_fold=True, _folds={"1": [0, 1]})
    builder = SimpleNamespace(value=lambda _: None, checkpoints=[])
    assert_refused(lambda: TrainedEnsemble.open_split(ensemble, builder, "val"), "2 runs predict fold 1")


def test_tracking_needs_a_single_model_of_objects():
    ensemble = SimpleNamespace(model=make_predictor("instance").model, averaged=SimpleNamespace(offload=False))
    assert_refused(lambda: TrainedEnsemble.single_pass_model.fget(ensemble), "mode=track follows", "single run")
