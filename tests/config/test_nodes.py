"""Errors of parts: names of parameters in Python, full keys of a config; keys and values are those of the target."""

import inspect
import pickle

import numpy as np
import pytest
import torch
from config_files import GROUPS, nodes, options, read_whole
from hydra.utils import get_object
from mistakes import assert_refused
from omegaconf import OmegaConf

from dinoseg.config.nodes import check_arguments, check_partial, instantiate
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.utils.errors import UserError, name_parameters

WEIGHTS = torch.ones(2)


def test_numbers_of_numpy_are_accepted():
    loss = CrossEntropy(WEIGHTS, ignore_index=np.int64(3), label_smoothing=np.float32(0.5))
    assert (loss.ignore_index, loss.label_smoothing) == (3, 0.5)
    message = "hard_fraction=1.5 is out of range. Give a number above 0 and at most 1."
    assert assert_refused(lambda: CrossEntropy(WEIGHTS, hard_fraction=np.float32(1.5)), message) == message


REGIONS = ("min_region", "largest_component", "regions")  # keys of `inference` that the builder reads
DATA = ("data.root=x", "data.classes=[a,b]")


@pytest.mark.parametrize(
    ("node", "words", "message"),
    [
        ("data.clips", ["data=videos", "data.clips.eval_cut=${data.clips.cut}", "data.clips.cut.short=long"],
         "data.clips.cut.short=long is unknown"),
        ("data.augment", ["data/augment/color=photometric", "data.augment.color.space=lab"],
         "data.augment.color.space=lab is unknown"),
        ("data.reader", ["data.fold=3", "data.folds=3"], "data.fold=3 with data.folds=3: k-fold"),
        ("data.augment", ["resolution.longest=80", "resolution.crop=[50,90]"],
         "resolution.crop=[50, 90] is larger than resolution.longest=80"),
        ("protocol", ["mode=score", "protocol.num_classes=3", "protocol.binary=true"],
         "protocol.binary=true with protocol.num_classes=3 protocol.reduce_zero"),
    ],
)  # fmt: skip
def test_errors_of_parts_name_full_keys(compose, node, words, message):
    cfg = compose(*(DATA if words[0] != "mode=score" else ()), *words)
    assert assert_refused(lambda: instantiate(OmegaConf.select(cfg, node)), message).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("loss=cross_entropy", "loss.criterion.average=all", "loss.criterion.hard_fraction=0.5"),
         "loss.criterion.average=all and loss.criterion.hard_fraction=0.5 exclude each other"),
        (("loss=ce_dice", "loss.criterion.terms.ce.average=known"),
         "loss.criterion.terms.ce.average=known is unknown. Choose one of labelled, all"),
    ],
)  # fmt: skip
def test_partial_nodes_name_full_keys(compose, words, message):
    node = compose(*DATA, *words).loss.criterion
    assert assert_refused(lambda: instantiate(node)(class_weights=WEIGHTS), message).startswith(message)


def test_interpolated_arguments_name_the_key_that_is_set(compose):
    node = compose(*DATA, "loss.weights=heavy").loss.class_weights
    words = ("loss.weights=heavy is unknown.", "one_minus_frequency", "a mapping to numbers")
    assert assert_refused(lambda: instantiate(node), *words).startswith(words[0])


@pytest.mark.parametrize(
    ("node", "words", "options"),
    [
        ("data.reader", ["data.reader.masks.format=rgb"], "ids, palette, binary"),
        ("data.augment", ["data.augment.resample=cubic"], "area, antialias, bilinear"),
        ("data.reader", ["data.reader.masks.on_size_mismatch=crop"], "error, resize_mask"),
        ("data.reader", ["data.reader.partition.by=chance"], "folder, lists, fraction"),
        ("data.reader", ["data=coco", "data.reader.shapes.crowds=x"], "class, ignore, object"),
        ("data.reader", ["data=sarrarp", "data.source=avi"], "frames, video"),
        ("inference", ["inference=windows", "inference.weights=hann"], "cosine, uniform"),
        ("optim.optimizer", ["optim.optimizer.weight_decay_on=none"], "matrices, all"),
        ("optim.schedule", ["optim.schedule.kind=step"], "constant, cosine, poly, exponential, one_cycle"),
        ("engine", ["engine.sharding=zero"], "none, fsdp"),
        ("slots", ["mode=track", "slots.match=colour"], "auto, overlap, soft_iou, similarity, appearance"),
        ("export", ["mode=export", "export=onnx", "export.precision=int4"], "float32, float16, int8"),
    ],
)
def test_unknown_words_name_the_options(compose, node, words, options):
    part = OmegaConf.select(compose(*DATA, *words), node)
    message = f"{words[-1]} is unknown. Choose one of {options}."
    assert assert_refused(lambda: instantiate(part, exclude=REGIONS), message) == message


@pytest.mark.parametrize(
    "node", [{"_target_": "mine.Head"}, {"_partial_": True}, {"_target_": "a.B", "_partial_": False}]
)
def test_parts_completed_at_run_time_need_a_partial_target(node):
    words = ("head: its YAML file must set `_target_: ", "` and `_partial_: true`")
    assert_refused(lambda: check_partial(OmegaConf.create(node), "head"), *words)


def test_nodes_without_a_config_name_parameters():
    node = {"_target_": "dinoseg.losses.overlap.Tversky", "_partial_": True, "alpha": -1}
    assert assert_refused(lambda: instantiate(node), "alpha=-1 is out of range").startswith("alpha=-1")


def test_partial_nodes_can_be_pickled(compose):
    head = {"_target_": "dinoseg.models.heads.cnn.CnnHead", "_partial_": True, "kernel_size": 4}
    make = pickle.loads(pickle.dumps(instantiate(OmegaConf.create({"head": head}).head)))
    sizes = {"in_dim": 8, "num_layers": 1, "num_classes": 2, "patch_size": 8}
    assert assert_refused(lambda: make(**sizes), "head.kernel_size=4: only an odd kernel").startswith("head.")


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

    assert assert_refused(fail, expected) == expected


def test_key_that_is_a_number_is_named():
    node = OmegaConf.create({"head": {"_target_": "dinoseg.models.heads.linear.LinearHead", 3: 1}}).head
    assert_refused(lambda: instantiate(node), "does not take 3. ")


VIT = "dinoseg.models.backbones.transformers_vit.TransformersVit"
TIMM = "dinoseg.models.backbones.timm_backbone.TimmBackbone"
EOMT = "dinoseg.extensions.query_heads.eomt.EomtHead"


@pytest.mark.parametrize(
    ("target", "key", "value", "kind"),
    [
        (VIT, "layers", ["a"], "list of str"),
        (VIT, "layers", [0, 1.5], "list of float and int"),
        (VIT, "layers", [True], "list of bool"),
        (VIT, "layers", [[1]], "list of list"),
        (VIT, "mean", [0.5, "x", 0.5], "list of float and str"),
        (TIMM, "std", [None], "list of NoneType"),
        (EOMT, "anneal", [[0.1, "b"]], "list of list"),
        (VIT, "layers", 3, "int"),
    ],
)
def test_elements_of_another_type_are_refused(target, key, value, kind):
    with pytest.raises(UserError) as caught:
        check_arguments(target, {key: value})
    assert str(caught.value).startswith(f"{key}={value} is of type {kind}. Give ")
    remedy = "" if isinstance(value, list) else f" A list is written in brackets: {key}=[{value}]."
    assert "a list of " in str(caught.value) and str(caught.value).endswith(remedy)


@pytest.mark.parametrize("value", [None, 5, "x", [1], {"a": 1}])
def test_plain_value_for_a_group_of_keys_is_refused(value):
    with pytest.raises(UserError, match=r"data\.reader\.layout=.* set one of them, as data\.reader\.layout\.KEY="):
        target, key = "dinoseg.data.formats.folder.folder_dataset", "data.reader.layout"
        check_arguments(target, {"layout": value}, {"layout": key})


def test_brackets_are_not_suggested_where_they_do_not_help():
    with pytest.raises(UserError, match=r"outputs=null is of type NoneType\. Give a list of texts\.$"):
        check_arguments("dinoseg.modes.predict.predict", {"outputs": None})


@pytest.mark.parametrize("key", ["cache", "workers"])
def test_value_that_yaml_reads_as_false_must_be_quoted(key):
    with pytest.raises(UserError, match=rf'{key}=False is of type bool.* write such a word in quotes \("off"\)\.$'):
        check_arguments("dinoseg.training.engine.Engine", {key: OmegaConf.create("word: off").word})


@pytest.mark.parametrize("scale", [0, 17, float("nan")])
def test_image_scale_is_limited_to_prevent_hours_of_work(scale):
    with pytest.raises(UserError, match="scales=.* is out of range. Give a number above 0 and at most 16 for each"):
        check_arguments("dinoseg.inference.windows.Windows", {"scales": [1.0, scale]})


def test_numeric_keys_refuse_text():
    """The launcher refuses text for keys that hold a number in config files, without reading signatures."""
    count = 0
    for group in GROUPS:
        for option in options(group) if group != "hparam" else ():
            for _, node in nodes(read_whole(group, option)):
                parameters = inspect.signature(get_object(node["_target_"])).parameters
                for key in parameters.keys() & {key for key, value in node.items() if isinstance(value, int | float)}:
                    count += 1
                    with pytest.raises(UserError, match=f"^{key}=text is (of type str|unknown)"):
                        check_arguments(node["_target_"], {key: "text"})
    assert count > 200
