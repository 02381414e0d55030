"""Conversion of a trained model of this process to the public `Model`."""

from dinoseg.experiment.trained import Trained
from dinoseg.export.runtime.facts import ModelFacts
from dinoseg.export.runtime.model import Model
from dinoseg.export.runtime.torch_runtime import TorchRuntime
from dinoseg.inference.trained_sizes import TrainedSizes, keep_scale


def model_of(trained: Trained, sizes: TrainedSizes | None) -> Model:
    """Return a trained model as a `Model` for images of any kind.

    Args:
        trained: in eval mode.
        sizes: training sizes to which images are reduced, as `sizes_to_keep` returns them.
    """
    keep_scale(trained.model, sizes)
    return Model(TorchRuntime(trained.predictor), ModelFacts.of(trained.info, "the checkpoint"))
