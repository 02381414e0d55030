"""Segmentation with DINO backbones, trained from Hydra configs; `load` loads a trained model without a config."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinoseg.api.modes import compare, evaluate, predict, score, track, train
    from dinoseg.api.results import Comparison, Results, Scores
    from dinoseg.api.runs import Run
    from dinoseg.export.runtime.load import load
    from dinoseg.export.runtime.model import Model
    from dinoseg.utils.errors import UserError

_PLACES = {  # public name to its module, imported on first access
    **dict.fromkeys(("compare", "evaluate", "predict", "score", "track", "train"), "dinoseg.api.modes"),
    **dict.fromkeys(("Comparison", "Results", "Scores"), "dinoseg.api.results"),
    **{"Run": "dinoseg.api.runs", "UserError": "dinoseg.utils.errors"},
}
__all__ = [
    "Comparison",
    "Model",
    "Results",
    "Run",
    "Scores",
    "UserError",
    "__version__",
    "compare",
    "evaluate",
    "load",
    "predict",
    "score",
    "track",
    "train",
]

try:
    __version__ = version("dinoseg")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import a public name on first access, so that `import dinoseg` stays cheap."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name == "load":
        from dinoseg.export.runtime.load import load

        return load
    if name == "Model":
        from dinoseg.export.runtime.model import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
