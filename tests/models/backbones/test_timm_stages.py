from collections import OrderedDict

import timm
from torch import nn

from dinoseg.models.backbones.timm_backbone import stages


def toy():
    lists = nn.Sequential(OrderedDict(a=nn.Conv2d(1, 1, 1), b=nn.Conv2d(1, 1, 1), c=nn.Conv2d(1, 1, 1)))
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 1, 1), act=nn.ReLU(), blocks=lists, tail=nn.Conv2d(1, 1, 1)))


def test_a_stage_is_all_that_runs_since_the_tap_before():
    model = toy()
    found = stages(model, ["act", "blocks.b", "blocks"])
    assert [list(stage) for stage in found] == [
        [model.stem, model.act],
        [model.blocks.a, model.blocks.b],
        [model.blocks.c],
    ]
    assert len(stages(model, ["tail"])[0]) == 6


def test_tap_can_be_inside_a_module():
    model = toy()
    model.stem = nn.Identity()
    model.stem.inner = nn.ReLU()
    assert list(stages(model, ["stem.inner", "act"])[0]) == [model.stem]


def test_names_that_the_model_does_not_have_make_it_one_stage():
    model = toy()
    for taps in (["block.0", "block.1"], ["act", "stages.0"], ["blocks.b", "act"], ["stem.x", "stem.y"], ["bloc"]):
        assert stages(model, taps) == [model]


def test_the_stages_of_an_efficientnet_leave_no_block_out():
    model = timm.create_model("test_efficientnet", num_classes=0)
    found = stages(model, [note["module"] for note in model.feature_info])
    inside = {parameter for stage in found for parameter in stage.parameters()}
    outside = [name for name, parameter in model.named_parameters() if parameter not in inside]
    assert all(name.startswith(("conv_head", "bn2")) for name in outside) and len(found) == 5
