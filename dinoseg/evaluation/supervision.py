"""Tracker supervision by the masks of a benchmark, and the protocol that scores the tracked masks."""

from collections.abc import Sequence

from omegaconf import DictConfig

from dinoseg.config.nodes import instantiate, keeping
from dinoseg.data.clips.videos import Video
from dinoseg.metrics.protocols.contract import ScoreProtocol
from dinoseg.utils.errors import UserError

SUPERVISION = ("none", "first_frame")


def chosen_supervision(cfg: DictConfig, asked: str | None) -> str:
    """Return the supervision of a tracker: `asked` if given, else the default of the data set.

    Raises:
        UserError: the supervision is unknown, or the data set has no masks.
    """
    if cfg.data.tracking is None:
        raise UserError(
            f"data={cfg.choices.data} has no masks of objects, so mode=eval can neither give nor score any. Choose "
            "data=davis2016, davis2017, youtube_vos or movi; mode=track follows objects through videos of your own."
        )
    supervision = asked or cfg.data.tracking.supervision
    if supervision not in SUPERVISION:
        raise UserError(f"mode.supervision={supervision} is unknown. Choose one of {', '.join(SUPERVISION)}, or null.")
    return supervision


def prompts_of(cfg: DictConfig, supervision: str, videos: Sequence[Video], split: str) -> str:
    """Return which masks prompt a tracker, see `prompted_frames`: `none`, `first` or `appearing`.

    Raises:
        UserError: no video of the split has a mask for prompting.
    """
    if supervision == "none":
        return "none"
    if not any(video.masks for video in videos):
        raise UserError(
            f"mode.supervision={supervision}: the videos of split {split} have no masks that could be given. "
            "Add them; or find objects without, by resume=RUN of a model of slots and mode.supervision=none."
        )
    return "appearing" if cfg.data.tracking.later else "first"


def protocol_of(cfg: DictConfig, supervision: str) -> ScoreProtocol | None:
    """Return the protocol that scores a data set's videos; None without one.

    Raises:
        UserError: the config node is not a `ScoreProtocol`.
    """
    node = cfg.data.tracking.protocols[supervision]
    if node is None:
        return None
    return keeping(ScoreProtocol, instantiate(node), f"data.tracking.protocols.{supervision}")  # type: ignore[type-abstract]
