"""Segmentation with DINO backbones, trained from Hydra configs; `load` loads a trained model without a config."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinoseg.export.runtime.load import load
    from dinoseg.export.runtime.model import Model

__all__ = ["Model", "__version__", "load"]

try:
    __version__ = version("dinoseg")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import `load` and `Model` on first access, so that `import dinoseg` stays cheap."""
    if name == "load":
        from dinoseg.export.runtime.load import load

        return load
    if name == "Model":
        from dinoseg.export.runtime.model import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
