"""Compose the config of a data set alone, which takes a tenth of the time of a whole config."""

from pathlib import Path

from hydra import compose, initialize_config_dir

import dinoseg
from dinoseg.config.resolvers import register_resolvers

CONFIGS = Path(dinoseg.__file__).parent / "cfg"


def load(name, root, *overrides):
    """Return the node of a data set, with its root and overrides."""
    register_resolvers()
    given = ["+resolution={crop: [64, 96], longest: 200}", "+cache_dir=cache", *overrides]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(f"data/{name}", [f"data.root='{root}'", *given]).data
