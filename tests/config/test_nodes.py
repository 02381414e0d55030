"""Errors of parts: parameter names in Python, full keys where a config node is instantiated."""

import pickle

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dinoseg.config.nodes import check_partial, instantiate
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.utils.errors import UserError, name_parameters

WEIGHTS = torch.ones(2)


def refusal(make):
    with pytest.raises(UserError) as caught:
        make()
    return str(caught.value)


def build_loss(compose, *words):
    cfg = compose("data.root=x", "data.classes=[a,b]", *words)
    return instantiate(cfg.loss.criterion)(class_weights=WEIGHTS)


def test_user_errors_are_value_errors():
    with pytest.raises(UserError, match=r"^hard_fraction=2 is out of range\. Give a number above 0 and at most 1\.$"):
        CrossEntropy(WEIGHTS, hard_fraction=2)


def test_numbers_of_numpy_are_accepted():
    loss = CrossEntropy(WEIGHTS, ignore_index=np.int64(3), label_smoothing=np.float32(0.5))
    assert (loss.ignore_index, loss.label_smoothing) == (3, 0.5)
    with pytest.raises(UserError, match=r"^hard_fraction=1\.5 is out of range"):
        CrossEntropy(WEIGHTS, hard_fraction=np.float32(1.5))


def test_partial_nodes_name_full_keys(compose):
    words = ("loss=cross_entropy", "loss.criterion.average=all", "loss.criterion.hard_fraction=0.5")
    message = refusal(lambda: build_loss(compose, *words))
    assert message.startswith("loss.criterion.average=all and loss.criterion.hard_fraction=0.5 exclude each other")


def test_nested_terms_name_their_place(compose):
    message = refusal(lambda: build_loss(compose, "loss=ce_dice", "loss.criterion.terms.ce.average=known"))
    assert message.startswith("loss.criterion.terms.ce.average=known is unknown. Choose one of labelled, all")


def test_constructors_name_full_keys(compose):
    node = compose("mode=score", "protocol.num_classes=3", "protocol.binary=true").protocol
    assert refusal(lambda: instantiate(node)).startswith(
        "protocol.binary=true with protocol.num_classes=3 protocol.reduce_zero"
    )


def test_interpolated_arguments_name_the_key_that_is_set(compose):
    cfg = compose("data.root=x", "data.classes=[a,b]", "loss.weights=heavy")
    message = refusal(lambda: instantiate(cfg.loss.class_weights)([1, 1], ["a", "b"]))
    assert message.startswith("loss.weights=heavy is unknown.") and "'loss.weights={b: 3}'" in message


def test_parts_within_a_node_name_full_keys(compose):
    cfg = compose("data=videos", "data.root=x", "data.clips.eval_cut=${data.clips.cut}", "data.clips.cut.short=long")
    assert refusal(lambda: instantiate(cfg.data.clips)).startswith("data.clips.cut.short=long is unknown")
    cfg = compose("data.root=x", "data.classes=[a,b]", "data/augment/color=photometric", "data.augment.color.space=lab")
    assert refusal(lambda: instantiate(cfg.data.augment)).startswith("data.augment.color.space=lab is unknown")
    cfg = compose("data.root=x", "data.classes=[a,b]", "data.fold=3", "data.folds=3")
    assert refusal(lambda: instantiate(cfg.data.reader)).startswith("data.fold=3 data.folds=3: give two folds")
    cfg = compose("data.root=x", "data.classes=[a,b]", "resolution.longest=80", "resolution.crop=[50,90]")
    expected = "resolution.crop=[50, 90] is larger than resolution.longest=80"
    assert refusal(lambda: instantiate(cfg.data.augment)).startswith(expected)


@pytest.mark.parametrize(
    ("node", "words", "options"),
    [
        ("data.reader", ["data.reader.masks.format=rgb"], "ids, palette, binary"),
        ("data.augment", ["data.augment.resample=cubic"], "area, antialias, bilinear"),
        ("data.opened", ["data.on_error=ignore"], "stop, skip"),
        ("data.reader", ["data.reader.masks.on_size_mismatch=crop"], "error, resize_mask"),
        ("data.reader", ["data.reader.partition.by=chance"], "folder, lists, fraction"),
        ("data.reader", ["data=coco", "data.reader.shapes.crowds=x"], "class, ignore"),
        ("data.reader", ["data=sarrarp", "data.source=avi"], "frames, video"),
        ("inference", ["inference=windows", "inference.weights=hann"], "cosine, uniform"),
        ("optim.optimizer", ["optim.optimizer.weight_decay_on=none"], "matrices, all"),
        ("optim.schedule", ["optim.schedule.kind=step"], "constant, cosine, poly, exponential, one_cycle"),
        ("engine", ["engine.sharding=zero"], "none, fsdp"),
        ("slots", ["mode=track", "slots.match=colour"], "auto, overlap, soft_iou, similarity, appearance"),
        ("tracker", ["mode=track", "tracker.window=hexagon"], "circle, square"),
        ("export", ["mode=export", "export=onnx", "export.precision=int4"], "float32, float16, int8"),
    ],
)
def test_unknown_words_name_the_options(compose, node, words, options):
    cfg = compose("data.root=x", "data.classes=[a,b]", *words)
    message = refusal(lambda: instantiate(OmegaConf.select(cfg, node)))
    assert message == f"{words[-1]} is unknown. Choose one of {options}."


@pytest.mark.parametrize(
    "node", [{"_target_": "mine.Head"}, {"_partial_": True}, {"_target_": "a.B", "_partial_": False}]
)
def test_parts_completed_at_run_time_need_a_partial_target(node):
    with pytest.raises(UserError, match="^head: its YAML file must set `_target_: .*` and `_partial_: true`"):
        check_partial(OmegaConf.create(node), "head")


def test_nodes_without_a_config_name_parameters():
    node = {"_target_": "dinoseg.losses.overlap.Tversky", "_partial_": True, "alpha": -1}
    assert refusal(lambda: instantiate(node)).startswith("alpha=-1 is out of range")


def test_partial_nodes_can_be_pickled(compose):
    head = {"_target_": "dinoseg.models.heads.cnn.CnnHead", "_partial_": True, "kernel_size": 4}
    make = pickle.loads(pickle.dumps(instantiate(OmegaConf.create({"head": head}).head)))
    sizes = {"in_dim": 8, "num_layers": 1, "num_classes": 2, "patch_size": 8}
    assert refusal(lambda: make(**sizes)).startswith("head.kernel_size=4: only an odd kernel")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("rank=0: too small", "adapter.rank=0: too small"),
        ("rank is too small", "adapter.rank is too small"),
        ("ranks=0: the rank is too small", "ranks=0: the rank is too small"),
        ("Set rank=1 or arch.depth=2", "Set adapter.rank=1 or adapter.arch.depth=2"),
        ("other.rank=0 and max_rank=1", "other.rank=0 and max_rank=1"),
    ],
)
def test_only_names_of_parameters_are_replaced(message, expected):
    def fail():
        with name_parameters({"rank": "adapter.rank", "arch": "adapter.arch"}):
            raise UserError(message)

    assert refusal(fail) == expected


def test_key_that_is_a_number_is_named():
    node = OmegaConf.create({"head": {"_target_": "dinoseg.models.heads.linear.LinearHead", 3: 1}}).head
    assert "does not take 3. " in refusal(lambda: instantiate(node))
