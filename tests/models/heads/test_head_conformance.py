"""What every head promises that scores classes, whatever backbone it reads."""

from functools import partial

import pytest
from config_files import options, read_whole
from eomt_making import FAMILIES
from omegaconf import OmegaConf
from tiny_parts import SMALL_HEADS, load_option, tiny_node

from dinoseg.config.nodes import instantiate
from dinoseg.extensions.query_heads.eomt import EomtHead
from dinoseg.extensions.query_heads.pmt import PmtHead
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.heads.dpt import DptHead
from dinoseg.models.heads.upernet import UperNetHead
from dinoseg.testing import check_head

pytestmark = pytest.mark.slow

ON_BLOCKS = ("eomt", "pmt")  # heads that read the blocks or tokens of a transformer, see below
FILES = {option: read_whole("head", option) for option in options("head")}
HEADS = [
    option
    for option, file in FILES.items()
    if "num_classes" in file and file.get("weights") != "???" and option not in ON_BLOCKS
]


# the trainings of the matrix have quick ones of mask2former, too
@pytest.mark.parametrize(
    "option",
    [pytest.param(option, marks=[pytest.mark.heavy] if option == "mask2former" else []) for option in HEADS],
)
def test_a_head_keeps_the_contract(option):
    node = load_option("head", option) | SMALL_HEADS.get(option, {})
    num_layers = 4 if node["layers"] == "quarters" else len(node["layers"])
    if "patch_size" in node:
        node["patch_size"] = 8
    make = instantiate({key: value for key, value in node.items() if key not in ("layers", "lr", "num_classes")})
    check_head(make, num_layers=num_layers)


@pytest.mark.parametrize("head", [EomtHead, PmtHead])
@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[] if family == "dinov3_vit" else [pytest.mark.heavy]) for family in FAMILIES],
)
def test_a_head_on_blocks_keeps_the_contract(family, head):
    arch, patch_size = FAMILIES[family]
    backbone = TransformersVit(family, arch, "random", patch_size)
    check_head(partial(head, patch_size=patch_size, blocks=2, num_queries=5), backbone)


@pytest.mark.parametrize(
    "make",
    [
        partial(DptHead, features=8, batch_norm=False),
        pytest.param(partial(UperNetHead, channels=8), marks=pytest.mark.heavy),
    ],
)
def test_a_head_on_a_pyramid_keeps_the_contract(make):
    node = OmegaConf.merge(tiny_node("convnext"), {"layers": "quarters"})
    check_head(make, instantiate(OmegaConf.to_container(node)))
