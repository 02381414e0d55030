"""A trained model of this program as one that takes pictures of any kind."""

from dinoseg.experiment.trained import Trained
from dinoseg.export.runtime.facts import Facts
from dinoseg.export.runtime.model import Model
from dinoseg.export.runtime.torch_runtime import TorchRuntime
from dinoseg.inference.trained_sizes import TrainedSizes, keep_scale


def model_of(trained: Trained, sizes: TrainedSizes | None) -> Model:
    """Return a trained model as one to use.

    Args:
        trained: in eval mode.
        sizes: those that pictures are brought to, as `runs.trained.sizes_to_keep` gives them.
    """
    keep_scale(trained.model, sizes)
    return Model(TorchRuntime(trained.predictor), Facts.of(trained.info, "the checkpoint"))
