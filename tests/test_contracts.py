"""A backbone, a head and a loss that say no more than they must; and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from mistakes import assert_refused
from omegaconf import OmegaConf
from torch import nn

from dinoseg.core.contracts import Backbone, Head
from dinoseg.core.geometry import upsample
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.video_scores.benchmark_videos import benchmark_videos
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.models.adapters import Frozen, LastBlocks, Lora
from dinoseg.models.model import SegmentationModel, trained_names


class Least(Backbone):
    """Blocks and a norm of its own, under the names of the contract's properties."""

    dim, patch_size, num_layers, depth = 3, 4, 1, 1

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3))])
        self.norm = nn.LayerNorm(3)
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((3, 1, 1), 0.25))

    def forward(self, images):
        cells = nn.functional.avg_pool2d(self.pixels(images), self.patch_size).movedim(1, -1)
        return [self.norm(self.blocks[0](cells)).movedim(-1, 1)]


class Scores(Head):
    def forward(self, features):
        return features[0]

    def predict(self, outputs, size, valid):
        return nn.functional.interpolate(outputs, size)


def test_parts_that_say_the_least_work():
    model = SegmentationModel(LastBlocks(1)(Least()), Scores())
    model.set_progress(1, 2)
    assert model(torch.rand(2, 3, 6, 9)).scores().shape == (2, 3, 6, 9)
    assert model.head.no_classes is None and not model.head.mixture and model.head.min_batch_size == 1
    assert all(parameter.requires_grad for parameter in model.parameters())  # the norm's too, which the contract finds
    assert trained_names(model) == set(model.state_dict())
    assert_refused(model.backbone.export_state, "Least has no weights to export")


class GridScores(Head):
    def forward(self, features):
        return {"scores": features[0]}

    def grid_scores(self, outputs):
        return outputs["scores"]


def test_grid_head_defines_its_scores_once():
    prediction = SegmentationModel(Least(), GridScores())(torch.rand(2, 3, 6, 9))
    assert prediction.grid is prediction.outputs["scores"] and prediction.grid.shape == (2, 3, 2, 3)
    assert torch.equal(prediction.scores(), upsample(prediction.grid, (6, 9), (6 / 8, 9 / 12)))
    assert SegmentationModel(Least(), Scores())(torch.rand(2, 3, 6, 9)).grid is None
    with pytest.raises(NotImplementedError):
        Head().predict(torch.zeros(1), (1, 1), (1.0, 1.0))


@pytest.mark.parametrize(("adapt", "calls"), [(Frozen(), [4, 4, 4]), (LastBlocks(1), [12])])
def test_frozen_backbone_runs_in_small_chunks(adapt, calls):
    model = SegmentationModel(adapt(Least()), Scores())
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    images = torch.rand(12, 3, 6, 9)
    outputs = model(images).outputs
    assert seen == calls
    assert torch.equal(outputs, model.backbone(images)[0])
    seen.clear()
    model(images[:7])
    assert seen == ([1] * 7 if len(calls) > 1 else [7])  # compiled blocks want one size
    seen.clear()
    assert model(images[:0]).outputs.shape == (0, 3, 2, 3) and seen == [0]


def test_an_exported_graph_takes_any_number_of_images():
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Frozen()(Least())

        def forward(self, images):
            return self.backbone.maps(images)

    maps = Maps()
    images = torch.rand(12, 3, 8, 8)
    graph = torch.export.export(maps, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    torch.testing.assert_close(graph.module()(images[:7]), maps(images[:7]))


def test_blocks_are_those_that_a_backbone_keeps():
    assert list(Backbone().blocks) == [] and Backbone().norm is None
    model = Backbone()
    model.blocks = nn.Sequential(nn.Identity())  # as timm keeps them
    assert isinstance(model.blocks, nn.Sequential) and len(model.blocks) == 1
    assert_refused(lambda: Lora(1, 1)(Frozen()(Backbone())), "matches no linear layer")


def test_a_part_that_keeps_no_contract_is_refused(compose):
    def refused(build, key, contract):
        remedy = "Inherit from that class; a YAML file with `_partial_: true` gives no object, so remove that line."
        assert_refused(build, f"{key}: ", f"is not an object of dinoseg.core.contracts.{contract}. {remedy}")

    base = compose("backbone=tiny", "data=camvid", "data.root=x")
    plain = {"_target_": "torch.nn.Identity"}
    builders = {key: Builder(OmegaConf.merge(base, {key: plain})) for key in ("backbone", "head")}
    refused(lambda: builders["backbone"].model(untrained=True), "backbone", "Backbone")
    refused(lambda: builders["backbone"].backbone(), "backbone", "Backbone")  # as label propagation takes it
    refused(lambda: builders["head"].model(untrained=True), "head", "Head")
    of_loss = Builder(OmegaConf.merge(base, {"loss": {"criterion": plain}}))
    refused(lambda: of_loss.criterion(class_weights=torch.ones(2)), "loss.criterion", "Loss")
    tracking = {"supervision": "none", "protocols": {"none": plain}}
    build = Builder(OmegaConf.create({"data": {"tracking": tracking}, "choices": {}}))
    words = "is not an object of dinoseg.extensions.protocols.contract.ScoreProtocol."
    assert_refused(lambda: benchmark_videos(build, "val", None), words)


class Misspelt(CrossEntropy):
    needs = frozenset({"mask"})


def test_a_loss_that_needs_what_no_head_provides_is_refused(compose):
    cfg = compose("data=camvid", "data.root=x", "head=linear")
    builder = Builder(OmegaConf.merge(cfg, {"loss": {"criterion": {"_target_": f"{__name__}.Misspelt"}}}))
    method, outline = builder.make_training(), SimpleNamespace(head=Scores(), task=builder.task)
    names = "loss=cross_entropy needs mask, and head=linear with task=semantic provides class scores alone."
    assert_refused(lambda: method.check_parts(outline, 1), names, "Choose a head that provides this, or another loss.")
    outline.head.provides = frozenset({"masks"})
    assert_refused(lambda: method.check_parts(outline, 1), "needs mask, and ", "provides masks.")


CAMVID = ("data=camvid", "data.root=x", "loss=cross_entropy")
SLOTS = ("trainer=slots", "head=slots", "loss=feature_reconstruction", "data=movi", "data.root=x")


def test_each_class_weighs_the_same_where_no_labels_are_counted(compose):
    plain, by_rarity = (compose(*CAMVID, f"loss.weights={weights}") for weights in ("none", "median"))
    names = [str(name) for name in plain.data.classes]
    unread = SimpleNamespace(classes=names)  # masks that nobody may read
    for loss in (Builder(plain).unweighted_loss(), Builder(by_rarity).unweighted_loss(), Builder(plain).loss(unread)):
        assert torch.equal(loss.weight, torch.ones(len(names)))
    with pytest.raises(TypeError, match="has no len"):  # it counts them
        Builder(by_rarity).loss(unread)


def test_a_loss_that_knows_no_classes_gets_no_weights(compose):
    cfg = compose(*SLOTS)
    assert "slots" in Builder(cfg).unweighted_loss().needs & Builder(cfg).loss(None).needs
