"""The inference strategy of a model that an exported graph, one pass over an image, does not apply."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dinoseg.checkpoints.trained import TrainedModel
from dinoseg.config.stored import Source, compose_stored
from dinoseg.core.sizes import Size
from dinoseg.experiment.models import ModelBuilder
from dinoseg.training.description import USE, resolve_score
from dinoseg.utils.wording import count_of, format_override

logger = logging.getLogger(__name__)
_ONE_PASS = (
    "inference=whole inference.flips=none inference.scales=[1.0] inference.min_region=0 inference.largest_component=[]"
)
_NO_REGIONS = {"min_region": 0, "largest_component": []}  # defaults of keys that the strategy's class does not take
_SELECTING = "miou"  # value of `trainer.score` for which a checkpoint's best score is its mIoU


@dataclass(frozen=True)
class Strategy:
    """Inference strategy that is stored with a model, and which a graph lacks.

    Attributes:
        words: its option and its values other than defaults, as typed on a command line.
        miou: of the training's validation with it, 0..1; None: unknown.
    """

    words: Sequence[str]
    miou: float | None


def missing_strategy(trained: TrainedModel, sizes: Sequence[Size], folders: Sequence[str] = ()) -> Strategy | None:
    """Return the strategy stored with a model if its predictions differ from those of one pass over the whole image.

    Args:
        trained: the loaded model; the strategy is that of its checkpoint, whatever the command line sets.
        sizes: (H, W) of the images of the verification.
        folders: further folders of config groups.

    Returns:
        None if the strategy is such a pass for images of all `sizes`, or if the checkpoint stores none.
    """
    stored = trained.info["config"]
    if stored.get(USE) is None:
        return None
    description = {**trained.info, "config": {key: stored[key] for key in (USE, "resolution")}}
    builder = ModelBuilder.of(compose_stored(description, Source("resume", folders)))
    strategy, values = builder.strategy(trained.classes), builder.settings(USE)
    if all(strategy.equals_single_pass(trained.model, size, trained.autocast) for size in sizes):
        return None
    parameters = inspect.signature(type(builder.part(USE))).parameters
    defaults = _NO_REGIONS | {name: each.default for name, each in parameters.items()}
    values.pop("regions", None)
    words = [f"{USE}={trained.info['choices'][USE]}"]
    for key, value in values.items():
        if not key.startswith("_") and not _is_default(value, defaults.get(key)):
            words.append(f"{USE}.{key}={format_override(value)}")
    progress = trained.info["progress"]
    is_scored = resolve_score(stored) == _SELECTING and progress["step"] == progress["best_step"]
    # the strategy of a self-contained file may have been given at its export
    return Strategy(words, progress["best"] if is_scored and "facts" not in trained.info else None)


def warn_of_strategy(strategy: Strategy, name: str, report: dict[str, Any]) -> None:
    """Warn that an exported file lacks a strategy, with the mIoU of both where they are known.

    Args:
        strategy: of the model.
        name: of the file.
        report: of its verification, see `compare`.
    """
    scores = "" if strategy.miou is None else f" With its strategy the model scored mIoU {100 * strategy.miou:.2f}."
    if report["has_masks"]:
        images = count_of(report["pictures"], "image")
        scores += f" On the {images} of the verification, the file scored mIoU {100 * report['miou']['exported']:.2f}."
    logger.warning(
        "mode=eval and mode=predict use %s for this model. %s does not apply this: it predicts each image in one pass."
        "%s Apply the strategy in the program that calls the file. For scores that compare with those of the file, add "
        "%s to mode=eval.",
        *(" ".join(strategy.words), name, scores, _ONE_PASS),
    )


def _is_default(value: Any, default: Any) -> bool:
    return value == (list(default) if isinstance(default, tuple) else default)
