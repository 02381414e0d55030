"""Keys and values beside a target, held against its signature."""

import inspect

import pytest
from config_files import GROUPS, options, read_whole
from hydra.utils import get_object
from omegaconf import OmegaConf

from dinoseg.config.checks import check_arguments
from dinoseg.utils.errors import UserError

VIT = "dinoseg.models.backbones.transformers_vit.TransformersVit"
TIMM = "dinoseg.models.backbones.timm_backbone.TimmBackbone"
EOMT = "dinoseg.models.heads.eomt.EomtHead"


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


def test_elements_that_fit_are_accepted():
    for given in (
        {"layers": [0, -1]},
        {"layers": "quarters"},
        {"layers": []},
        {"mean": [0, 0.5, 1]},
        {"arch": {"a": 1}},
    ):
        check_arguments(VIT, given)
    check_arguments(TIMM, {"mean": None, "std": (1, 2, 3)})
    check_arguments(EOMT, {"anneal": [[0, 0.5], [0.2, 1]]})


@pytest.mark.parametrize("value", [None, 5, "x", [1], {"a": 1}])
def test_plain_value_for_a_group_of_keys_is_refused(value):
    with pytest.raises(UserError, match=r"mode\.shapes=.* set one of them, as mode\.shapes\.KEY="):
        check_arguments("dinoseg.modes.predict.predict", {"shapes": value}, {"shapes": "mode.shapes"})


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
            for node in tables(read_whole(group, option)):
                parameters = inspect.signature(get_object(node["_target_"])).parameters
                for key in parameters.keys() & {key for key, value in node.items() if isinstance(value, int | float)}:
                    count += 1
                    with pytest.raises(UserError, match=f"^{key}=text is of type str"):
                        check_arguments(node["_target_"], {key: "text"})
    assert count > 200


def tables(node):
    """Yield each mapping with a `_target_` at and below a node."""
    if isinstance(node, dict):
        yield from [node] if "_target_" in node else []
        for value in node.values():
            yield from tables(value)
