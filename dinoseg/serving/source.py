"""The model that is served: of a run or a checkpoint."""

from pathlib import Path

from omegaconf import DictConfig

from dinoseg.errors import UserError
from dinoseg.portable.model import Model
from dinoseg.portable.trained_model import model_of
from dinoseg.runs.trained import Trained, load_trained, sizes_to_keep


def load_served(cfg: DictConfig, out_dir: Path) -> tuple[Model, Trained]:
    """Return the model that `resume` names as one that takes pictures, and as it was trained.

    Raises:
        UserError: there is none, or it knows no classes.
    """
    trained = load_trained(cfg)
    if trained.model.head.slots is not None:
        raise UserError(
            f"resume={cfg.resume} is a model of slots, which knows no classes to serve. mode=track follows its "
            "segments through a video or a folder of frames."
        )
    return model_of(trained, sizes_to_keep(trained, out_dir)), trained
