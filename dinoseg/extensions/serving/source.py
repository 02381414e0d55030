"""Loading of the served model: from a run, a checkpoint or a one-file model."""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dinoseg.checkpoints.source import ModelSource
from dinoseg.checkpoints.trained import TrainedModel, find_trained_sizes
from dinoseg.checkpoints.unread import warn_unread
from dinoseg.core.channels import check_rgb
from dinoseg.core.contracts import require_classes
from dinoseg.extensions.feature_views.patches import list_layers
from dinoseg.extensions.feature_views.view import FeatureView
from dinoseg.extensions.tracking.tracker import Tracker
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.trained_sizes import TrainedSizes, limit_to_trained_size
from dinoseg.models.model import SegmentationModel
from dinoseg.runs.folder import command_line, find_typed_keys
from dinoseg.segmenter.facts import ModelFacts
from dinoseg.segmenter.load import open_file
from dinoseg.segmenter.model import Model
from dinoseg.segmenter.runtime import Options
from dinoseg.segmenter.torch_runtime import TorchRuntime
from dinoseg.utils.errors import UserError

_BATCH = 4  # frames per forward pass of a tracker
_FILE_KEYS = ("resolution", "task", "backbone", "adapter", "head", "inference", "data")  # set by the file


def load_served(source: ModelSource, out_dir: Path, file: str | None) -> Model:
    """Load the model of a file, or the one of `source`.

    Raises:
        UserError: if there is no model, both name one, it has no classes, or it has no objects and
            `mode.min_score` is typed.
    """
    model = _load(source, out_dir, file)
    if "mode.min_score" in find_typed_keys(out_dir) and not model.runtime.things:
        raise UserError("mode.min_score is for a model of objects (task=instance or panoptic). Leave it out.")
    return model


def _load(source: ModelSource, out_dir: Path, file: str | None) -> Model:
    if file is not None:
        if source.resume is not None:
            raise UserError(f"mode.model={file} and resume={source.resume} both name a model: give one of them.")
        opened = _open_model(source, out_dir, file)
        check_rgb(opened.facts.format, "an upload")
        return opened
    check_rgb(source.pixels, "an upload")
    trained = source.load()
    require_classes(trained.model.head, f"resume={source.resume}")
    return model_of(trained, find_trained_sizes(trained, out_dir))


def tracker_maker(
    make: Callable[..., Tracker], model: Model, min_score: float | None = None
) -> Callable[[], Tracker] | None:
    """Return a function that makes trackers of a model's backbone; None where torch does not run the model.

    With `min_score`, trackers follow the objects of at least this score that the model finds; None: it finds none.
    """
    predictor = _find_predictor(model)
    if predictor is None or (min_score is not None and not model.runtime.things):
        return None
    followed = predictor.model.backbone if min_score is None else predictor.model
    options = {} if min_score is None else {"min_score": min_score}
    machine = {"device": predictor.device, "autocast": predictor.autocast, "batch_size": _BATCH}
    return partial(make, followed, **machine, **options)


def open_views(model: Model) -> list[FeatureView]:
    """Return a view of the features of each layer that the model has; none where torch does not run the model."""
    predictor = _find_predictor(model)
    layers = () if predictor is None else list_layers(predictor.model.backbone)
    return [FeatureView(model, layer=layer) for layer in layers]


def _find_predictor(model: Model) -> Predictor | None:
    runtime = model.runtime
    if isinstance(runtime, TorchRuntime) and isinstance(runtime.predictor.model, SegmentationModel):
        return runtime.predictor
    return None


def _open_model(source: ModelSource, out_dir: Path, file: str) -> Model:
    """Open a one-file model with the settings that it stores; a delta's weights may be given on the command line."""
    typed = {word.lstrip("+").partition("=")[0] for word in command_line(out_dir)}
    weights = {part: source.settings(part)["weights"] for part in ("backbone", "head") if f"{part}.weights" in typed}
    unread = {key for key in typed if key.partition(".")[0] in _FILE_KEYS} - {f"{part}.weights" for part in weights}
    remedy = f"give {shlex.quote(f'resume={file}')} to override them."
    warn_unread(out_dir, unread, f"mode.model uses its stored settings; {remedy}")
    engine = source.settings("engine")
    machine = {"device": engine["device"], "precision": engine["precision"], "trust": list(source.config["trust"])}
    return open_file(Path(file).expanduser(), Options(**machine, **weights), key="mode.model")


def model_of(trained: TrainedModel, sizes: TrainedSizes | None) -> Model:
    """Return a trained model as a `Model` for images of any kind.

    Args:
        trained: in eval mode.
        sizes: training sizes to which images are reduced, as `find_trained_sizes` returns them.
    """
    limit_to_trained_size(trained.model, sizes)
    return Model(TorchRuntime(trained.predictor), ModelFacts.of(trained.info, "the checkpoint"))
