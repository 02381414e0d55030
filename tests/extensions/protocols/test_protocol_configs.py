"""Configs of protocols have the defaults of their classes, whose rules are complete, and which import little."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import dinoseg
from dinoseg.extensions.protocols import davis, sar_rarp50, sar_rarp50_seed, video_clustering

CFG = Path(dinoseg.__file__).parent / "cfg"
RULES = {"absent_class", "resolution", "ignore", "aggregation", "version", "differs"}
PROTOCOLS = {
    "davis2016": davis.Davis2016,
    "davis2017": davis.Davis2017,
    "davis2017_unsupervised": davis.Davis2017Unsupervised,
    "sar_rarp50": sar_rarp50.SarRarp50,
    "sar_rarp50_seed": sar_rarp50_seed.SarRarp50Seed,
    "video_clustering": video_clustering.VideoClustering,
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_config_makes_the_protocol_with_its_defaults(name):
    protocol = instantiate(OmegaConf.load(CFG / f"protocol/{name}.yaml"))
    expected = PROTOCOLS[name]()
    assert type(protocol) is type(expected) and vars(protocol) == vars(expected)
    assert protocol.name == name and protocol.rules.keys() >= RULES


def test_classes_of_sar_rarp50_are_those_of_its_data():
    assert tuple(OmegaConf.load(CFG / "data/sarrarp.yaml").classes[1:]) == sar_rarp50.CLASSES


def test_protocols_import_no_heavy_dependency():
    protocols = ("idd_lite", "cityscapes", "ade20k", "semantic", "davis")
    names = ", ".join(f"dinoseg.extensions.protocols.{name}" for name in protocols)
    code = f"import sys, {names}; sys.exit(not sys.modules.keys().isdisjoint(['torch', 'hydra', 'scipy']))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
