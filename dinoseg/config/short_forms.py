"""Keys that may be typed short: a crop as one number, the background by its name."""

from omegaconf import DictConfig, OmegaConf

from dinoseg.errors import UserError
from dinoseg.wording import listed


def squared(cfg: DictConfig) -> DictConfig:
    """Return `cfg` with a crop that is one number, n, written out as [n, n]."""
    crop = OmegaConf.select(cfg, "resolution.crop")
    return OmegaConf.merge(cfg, {"resolution": {"crop": [crop, crop]}}) if type(crop) is int else cfg  # type: ignore[return-value]


def background_of(cfg: DictConfig) -> int | None:
    """Return the id of the class that is no object, which `data.background` names; None: each is something.

    Raises:
        UserError: there is no such class.
    """
    background, names = cfg.data.background, list(map(str, cfg.data.classes))
    if background is None or background in names:
        return None if background is None else names.index(background)
    if type(background) is int and 0 <= background < len(names):
        return background
    raise UserError(
        f"data.background={background} is no class. Give the name or the id of one (0 to {len(names) - 1}: "
        f"{listed(names)}), or null where each class is something."
    )
