"""dinoseg: DINO backbones as segmenters, from Hydra configs."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dinoseg")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
