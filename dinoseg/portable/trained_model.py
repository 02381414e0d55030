"""A trained model of this program as one that takes pictures of any kind."""

from dinoseg.inference.trained_sizes import TrainedSizes, keep_scale
from dinoseg.portable.facts import Facts
from dinoseg.portable.model import Model
from dinoseg.portable.torch_runtime import TorchRuntime
from dinoseg.runs.trained import Trained


def model_of(trained: Trained, sizes: TrainedSizes | None) -> Model:
    """Return a trained model as one to use.

    Args:
        trained: in eval mode.
        sizes: those that pictures are brought to, as `runs.trained.sizes_to_keep` gives them.
    """
    keep_scale(trained.model, sizes)
    return Model(TorchRuntime(trained.predictor), Facts.of(trained.info, "the checkpoint"))
