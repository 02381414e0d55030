"""Segmentation with DINO backbones, from Python and from the command line.

`train`, `evaluate`, `predict`, `track`, `score` and `compare` do what the modes of the command line do, in this
process. `load` loads a trained model. Errors that the caller can fix are `UserError`s. Nothing heavy is imported before
it is used.
"""

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

_MODULES = {  # module to the public names that it defines
    "dinoseg.api.modes": ("compare", "evaluate", "predict", "score", "track", "train"),
    "dinoseg.api.results": ("Comparison", "Results", "Scores"),
    "dinoseg.api.runs": ("Run",),
    "dinoseg.export.runtime.load": ("load",),
    "dinoseg.export.runtime.model": ("Model",),
    "dinoseg.utils.errors": ("UserError",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

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
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
