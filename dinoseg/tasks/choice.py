"""Choice of the training task by `trainer.feed`."""

from collections.abc import Mapping

from omegaconf import DictConfig

from dinoseg.tasks.clips import ClipRegime
from dinoseg.tasks.distil import DistilRegime
from dinoseg.tasks.images import ImageRegime
from dinoseg.tasks.regime import Regime
from dinoseg.tasks.self_training import SelfTrainingRegime
from dinoseg.utils.errors import UserError

REGIMES: Mapping[str, type[Regime]] = {  # by trainer.feed
    **{"images": ImageRegime, "clips": ClipRegime, "self_training": SelfTrainingRegime, "distil": DistilRegime}
}


def regime_of(cfg: DictConfig) -> type[Regime]:
    """Return the training task that a config's `trainer.feed` names.

    Raises:
        UserError: the name is unknown, or a teacher is given to a task without distillation.
    """
    if cfg.trainer.get("feed") not in REGIMES:
        raise UserError(f"trainer.feed={cfg.trainer.get('feed')} is unknown. Choose one of {', '.join(REGIMES)}.")
    if cfg.get("teacher") is not None and not issubclass(REGIMES[cfg.trainer.feed], DistilRegime):
        raise UserError(
            f"teacher={cfg.teacher} is read by trainer=distil alone, and this is trainer={cfg.choices.trainer} with "
            f"trainer.feed={cfg.trainer.feed}. Give trainer=distil, or leave teacher out."
        )
    return REGIMES[cfg.trainer.feed]
