import pytest
from config_files import options, read_whole
from omegaconf import OmegaConf

from dinoseg.tasks.choice import REGIMES, regime_of
from dinoseg.utils.errors import UserError


def test_each_trainer_names_a_regime():
    feeds = [read_whole("trainer", option)["feed"] for option in options("trainer")]
    assert len(feeds) >= 2 and set(feeds) == REGIMES.keys()


def test_another_is_refused():
    with pytest.raises(UserError, match=r"trainer\.feed=tokens is unknown\. Choose one of images, clips"):
        regime_of(OmegaConf.create({"trainer": {"feed": "tokens"}}))
