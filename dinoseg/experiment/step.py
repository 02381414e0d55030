"""Builder of the parts of a training for estimates and trials, from a config and overrides."""

from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.config.nodes import instantiate
from dinoseg.config.resolvers import register_resolvers
from dinoseg.experiment import build, criteria
from dinoseg.experiment.min_batch import check_batch, min_batch
from dinoseg.models.model import Segmenter
from dinoseg.training.parts import TrainingParts
from dinoseg.training.trainer import Settings
from dinoseg.utils.errors import UserError

_NEVER = 10**9  # steps
_QUANTISED = (4, 8)  # bits


def training_parts(cfg: DictConfig, overrides: Mapping[str, Any] | None = None) -> TrainingParts:
    """Return the parts of a config's training, for estimates and trials; see `check_trainer`.

    Args:
        cfg: the whole config.
        overrides: new values of keys and groups.

    Raises:
        UserError: the crop is invalid, or the shape of a sample is unknown.
    """
    cfg = with_overrides(cfg, overrides) if overrides else cfg
    bits = cfg.adapter.get("bits")
    whole: Any = OmegaConf.merge(cfg, {"adapter": {"bits": None}}) if bits in _QUANTISED else cfg

    def outline() -> Segmenter:
        model = build.outline(whole)
        # the source of the weights decides which tensors count as trained
        model.backbone.weights = cfg.backbone.get("weights", model.backbone.weights)
        model.head.weights = cfg.head.get("weights", model.head.weights)
        return model

    def settings(steps: int) -> Settings:
        lengths = {"steps": steps, "val_every": _NEVER, "save_every": None, "max_minutes": None}
        return build.loop_settings(cfg, lengths)

    shape = _sample_shape(cfg)
    checkpointing = {name: cfg[name].get("checkpointing") for name in ("backbone", "head")}
    return TrainingParts(
        model=partial(build.model, cfg, untrained=True),
        outline=outline,
        loss=partial(criteria.unweighted, cfg),
        optimizer=partial(build.optimizer, cfg),
        settings=settings,
        schedule=partial(instantiate, cfg.optim.schedule),
        check_batch=partial(check_batch, cfg),
        min_batch_size=partial(min_batch, cfg),
        shape=shape,
        num_classes=len(cfg.data.classes) if len(shape) == 3 else 0,
        scale=cfg.resolution.scale,
        batch_size=cfg.data.batch_size,
        accumulate=cfg.trainer.accumulate,
        has_ema=bool(cfg.trainer.ema),
        bits=bits if bits in _QUANTISED else None,
        seed=build.seed_of(cfg),
        score=cfg.trainer.score,
        loss_name=cfg.choices.loss,
        takes_blocks="blocks" in cfg.adapter,
        blocks=cfg.adapter.get("blocks"),
        checkpointing={name: value for name, value in checkpointing.items() if value is not None},
    )


def with_overrides(cfg: DictConfig, overrides: Mapping[str, Any]) -> DictConfig:
    """Return a copy of a config with new values of keys, and packaged options of groups."""
    new = OmegaConf.create(OmegaConf.to_container(cfg))
    assert isinstance(new, DictConfig)
    for key, value in overrides.items():
        if key in new.choices:
            new[key] = OmegaConf.load(str(files("dinoseg") / "cfg" / key / f"{value}.yaml"))
            new.choices[key] = value
        else:
            OmegaConf.update(new, key, value)
    return new


def restored(values: Mapping[str, Any]) -> DictConfig:
    """Return the config of its plain values, in a process that has not loaded a config yet."""
    register_resolvers()
    return OmegaConf.create(dict(values))


def check_trainer(cfg: DictConfig) -> None:
    """Refuse trainers of several heads or with unlabelled images: estimates cover one head and labelled images only.

    Raises:
        UserError: naming the overrides to give instead.
    """
    if "heads" in cfg.trainer:
        raise UserError(
            f"trainer={cfg.choices.trainer} trains several heads: what one takes is told here. Give head=NAME, without "
            "heads and trainer."
        )
    if "unlabelled" in cfg.trainer:
        raise UserError(
            f"trainer={cfg.choices.trainer} is not foretold: its step takes the images without masks as well. Leave "
            "trainer out for what the images with masks take; a batch of both takes that of all their views together."
        )


def _sample_shape(cfg: DictConfig) -> tuple[int, ...]:
    """Return the shape of a training sample's pixels, (3, H, W) or (T, 3, H, W).

    Raises:
        UserError: the crop is invalid, the data has no clips, or clips have no fixed length.
    """
    if build.loss_has_classes(cfg):
        instantiate(cfg.data.augment)
        return (3, *cfg.resolution.crop)
    if cfg.data.clips is None:
        raise UserError(f"data={cfg.choices.data} has no clips. Choose data=davis2017, movi or videos.")
    instantiate(cfg.data.view)
    length = cfg.data.clips.cut.length
    if not isinstance(length, int) or length < 1:
        raise UserError(
            f"data.clips.cut.length={length}: how many frames a clip has is needed here. Give a number of at least 1."
        )
    return (length, 3, *cfg.resolution.crop)
