"""Which kind of training a config means: the one place that asks."""

from collections.abc import Mapping

from omegaconf import DictConfig

from dinoseg.errors import UserError
from dinoseg.regimes.clips import ClipRegime
from dinoseg.regimes.images import ImageRegime
from dinoseg.regimes.regime import Regime

REGIMES: Mapping[str, type[Regime]] = {"images": ImageRegime, "clips": ClipRegime}  # by trainer.feed


def regime_of(cfg: DictConfig) -> type[Regime]:
    """Return the kind of training that a config's `trainer.feed` names.

    Raises:
        UserError: there is none of that name.
    """
    if cfg.trainer.feed not in REGIMES:
        raise UserError(f"trainer.feed={cfg.trainer.feed} is unknown. Choose one of {', '.join(REGIMES)}.")
    return REGIMES[cfg.trainer.feed]
