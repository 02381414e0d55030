"""Factory of trackers by label propagation, for config files: settings, called with a model, return a tracker."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from dinoseg.core.contracts import Backbone
from dinoseg.core.task import ObjectTask
from dinoseg.extensions.tracking.identities import ObjectTracker
from dinoseg.extensions.tracking.propagation.settings import PropagationSettings
from dinoseg.extensions.tracking.propagation.tracker import PropagationTracker
from dinoseg.extensions.tracking.smoothing import SmoothingTracker
from dinoseg.extensions.tracking.tracker import Autocast, Tracker
from dinoseg.inference.trained_sizes import TrainedSizes
from dinoseg.models.model import SegmentationModel


@dataclass(frozen=True)
class PropagationFactory(PropagationSettings):
    """Factory of trackers by label propagation; the arguments are those of `PropagationSettings`.

    With a backbone, objects of a first mask are tracked. With a segmenter, its classes are smoothed over time.
    With a model of objects, these get IDs.
    """

    def __call__(
        self,
        model: Backbone | SegmentationModel,
        *,
        device: torch.device | str = "cpu",
        autocast: Autocast = nullcontext,
        batch_size: int = 4,
        smoothing: float = 0.5,
        keep: int = 30,
        min_score: float = 0.5,
        sizes: TrainedSizes | None = None,
    ) -> Tracker:
        """Return a tracker; further arguments are for a segmenter, see `SmoothingTracker` and `ObjectTracker`."""
        if isinstance(model, SegmentationModel) and isinstance(model.task, ObjectTask):
            return ObjectTracker(
                model,
                self,
                keep=keep,
                min_score=min_score,
                sizes=sizes,
                autocast=autocast,
                batch_size=batch_size,
            )
        if isinstance(model, SegmentationModel):
            return SmoothingTracker(
                model, self, smoothing=smoothing, sizes=sizes, autocast=autocast, batch_size=batch_size
            )
        return PropagationTracker(model, self, device=device, autocast=autocast, batch_size=batch_size)
