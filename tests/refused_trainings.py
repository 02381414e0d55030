"""Start trainings of composed configs that must be refused, without the rest of a command line."""

from contextlib import chdir

import pytest
from config_files import GROUPS
from omegaconf import OmegaConf

from dinoseg.modes.train import train
from dinoseg.utils.errors import UserError

_bases = {}  # words -> what is composed of them


def refusal(compose, folder, base, words):
    """Return the message by which `train` refuses the config of two lists of words, of which `base` recurs.

    Values are set in a copy of the base's config, which takes a tenth of the time that Hydra needs.
    """
    if {word.partition("=")[0] for word in words} & {*GROUPS}:
        cfg = compose(*base, *words)
    else:
        if base not in _bases:
            _bases[base] = compose(*base)
        cfg = OmegaConf.merge(_bases[base], OmegaConf.from_dotlist(list(words)))
    with chdir(folder), pytest.raises(UserError) as raised:
        train(cfg, out_dir=folder / "refused", metrics_only=True, report=False)
    assert not (folder / "refused/checkpoints").exists()
    return str(raised.value)
