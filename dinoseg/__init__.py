"""Train segmentation models on DINO backbones, evaluate them, and predict with them.

These names are public; each has help with an example, such as `help(dinoseg.train)`. All packages below are internal,
except `losses`, `metrics`, `testing` and the base classes that docs/extending.md names.

Train and predict as the command line does. These functions write run folders:
    train        train a model; returns a Run
    evaluate     score a trained model on a split; returns Scores
    predict      segment images or videos; returns Results
    track        track objects through a video; returns Results
    score        score a folder of masks by a benchmark's protocol; returns Scores
    compare      compare evaluations, with confidence intervals; returns a Comparison
    export_onnx  write a model as an ONNX file that is verified on given images; returns Results

Models:
    load         load a trained model from a file, a checkpoint or a run folder
    create_model build a new model for a training loop of your own
    Segmenter    what both return: a torch.nn.Module that maps images to class logits
    Model        its base class, without torch: what `load` returns for ONNX files
    Segmentation the prediction of one image: mask, probabilities, overlay
    FeatureView  the features of a model as colours in one basis for many images, and as arrays
    segment_by_example  masks of a concept from a few images with masks, without training
    list_backbones, list_heads, list_adapters, list_recipes, list_datasets: names of options

Data, losses and metrics for a training loop of your own:
    open_dataset images and masks for a torch DataLoader; returns a SegmentationDataset
    losses       functions of logits and masks
    metrics      scores of predicted masks

For tests of your own parts:
    testing      checks of backbones, heads, losses and datasets

Mistakes that you can fix raise a UserError. `import dinoseg` is fast: torch is imported by the first name that needs
it. Import dinoseg before torch: it sets environment variables that torch reads when it is imported.
"""

import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinoseg import losses, metrics, testing
    from dinoseg.api.create import create_model
    from dinoseg.api.dataset import SegmentationDataset, open_dataset
    from dinoseg.api.modes import compare, evaluate, export_onnx, predict, score, track, train
    from dinoseg.api.options import list_adapters, list_backbones, list_datasets, list_heads, list_recipes
    from dinoseg.api.results import Comparison, Results, Scores
    from dinoseg.api.runs import Run
    from dinoseg.extensions.example.segment import segment_by_example
    from dinoseg.extensions.feature_views.view import FeatureView
    from dinoseg.segmenter.load import load
    from dinoseg.segmenter.model import Model, Segmentation
    from dinoseg.segmenter.segmenter import Segmenter
    from dinoseg.utils.errors import UserError

_SPINS = "300"  # compared with others in `benchmarks/busy.py`
_MODULES = {  # module to the public names that it defines
    "dinoseg.api.create": ("create_model",),
    "dinoseg.api.dataset": ("SegmentationDataset", "open_dataset"),
    "dinoseg.api.modes": ("compare", "evaluate", "export_onnx", "predict", "score", "track", "train"),
    "dinoseg.api.options": ("list_adapters", "list_backbones", "list_datasets", "list_heads", "list_recipes"),
    "dinoseg.api.results": ("Comparison", "Results", "Scores"),
    "dinoseg.api.runs": ("Run",),
    "dinoseg.extensions.example.segment": ("segment_by_example",),
    "dinoseg.extensions.feature_views.view": ("FeatureView",),
    "dinoseg.segmenter.load": ("load",),
    "dinoseg.segmenter.model": ("Model", "Segmentation"),
    "dinoseg.segmenter.segmenter": ("Segmenter",),
    "dinoseg.utils.errors": ("UserError",),
}
_PACKAGES = ("losses", "metrics", "testing")
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Comparison",
    "FeatureView",
    "Model",
    "Results",
    "Run",
    "Scores",
    "Segmentation",
    "SegmentationDataset",
    "Segmenter",
    "UserError",
    "__version__",
    "compare",
    "create_model",
    "evaluate",
    "export_onnx",
    "list_adapters",
    "list_backbones",
    "list_datasets",
    "list_heads",
    "list_recipes",
    "load",
    "losses",
    "metrics",
    "open_dataset",
    "predict",
    "score",
    "segment_by_example",
    "testing",
    "track",
    "train",
]


def _set_library_variables() -> None:
    """Set what torch and its OpenMP read when torch is imported, unless the environment configures it.

    Child processes inherit these variables:

    - `GOMP_SPINCOUNT`: threads that wait for one another spin only briefly before they sleep. Without a limit they spin
      for milliseconds after each of a step's thousands of parallel loops. If another process is busy, they take the
      processor from the thread that they wait for. libgomp, torch's OpenMP on Linux, reads it.
    - `PYTORCH_ENABLE_MPS_FALLBACK`: the CPU computes what MPS does not support.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    if sys.platform == "darwin":
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


_set_library_variables()  # here, before any other module of the package can import a library

try:
    __version__ = version("dinoseg")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import a public name on first access, so that `import dinoseg` stays cheap."""
    if name in _PACKAGES:
        return import_module(f"dinoseg.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
