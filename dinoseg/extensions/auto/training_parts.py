"""Builder of the parts of a training for estimates and trials, from a config and overrides."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dinoseg.experiment.builder import Builder
from dinoseg.extensions.auto.parts import TrainingParts
from dinoseg.models.model import SegmentationModel
from dinoseg.training.trainer import Settings
from dinoseg.utils.errors import UserError

_NEVER = 10**9  # steps
_QUANTISED = (4, 8)  # bits


def training_parts(builder: Builder, overrides: Mapping[str, Any] | None = None) -> TrainingParts:
    """Return the parts of a config's training, for estimates and trials; see `check_trainer`.

    Args:
        builder: of the whole config.
        overrides: new values of keys and groups.

    Raises:
        UserError: the crop is invalid, or the shape of a sample is unknown.
    """
    builder = builder.with_options(overrides) if overrides else builder
    bits = builder.value("adapter.bits")
    whole = builder.with_changes({"adapter": {"bits": None}}) if bits in _QUANTISED else builder

    def outline() -> SegmentationModel:
        model = whole.outline()
        whole.name_weights(model)
        return model

    def settings(steps: int) -> Settings:
        own = builder.loop_settings(samples=1)
        return replace(own, steps=steps, val_every=_NEVER, save_every=None, max_minutes=None)

    shape = _sample_shape(builder)
    checkpointing = {name: builder.value(f"{name}.checkpointing") for name in ("backbone", "head")}
    return TrainingParts(
        model=partial(builder.model, untrained=True),
        outline=outline,
        loss=builder.unweighted_loss,
        optimizer=builder.optimizer,
        settings=settings,
        schedule=builder.schedule,
        shape=shape,
        num_classes=len(builder.class_names) if len(shape) == 3 else 0,
        has_layers=builder.task.has_layers,
        scale=builder.value("resolution.scale"),
        batch_size=builder.value("data.batch_size"),
        accumulate=builder.value("trainer.accumulate"),
        has_ema=bool(builder.value("trainer.ema")),
        bits=bits if bits in _QUANTISED else None,
        seed=builder.seed,
        score=builder.value("trainer.score"),
        loss_name=builder.options["loss"],
        checkpointing={name: value for name, value in checkpointing.items() if value is not None},
    )


def check_trainer(builder: Builder) -> None:
    """Refuse trainers with unlabelled images: estimates cover labelled images only.

    Raises:
        UserError: naming the overrides to give instead.
    """
    if "unlabelled" in builder.value("trainer"):
        option = builder.options["trainer"]
        raise UserError(
            f"trainer={option} is not supported: its step also uses images without masks. Leave trainer out to "
            "estimate the images with masks; a batch of both needs the memory of all its images."
        )


def _sample_shape(builder: Builder) -> tuple[int, ...]:
    """Return the shape of a training sample's pixels, (C, H, W) or (T, 3, H, W).

    Raises:
        UserError: the crop is invalid, or the data has no clips of a fixed length.
    """
    crop = builder.value("resolution.crop")
    if builder.loss_has_classes:
        builder.part("data.augment")
        return (builder.pixels.channels, *crop)
    length = builder.value("data.clips.cut.length")
    if not isinstance(length, int) or length < 1:
        raise UserError(
            f"data.clips.cut.length={length}: the number of frames per clip is needed. Give a number of at least 1."
        )
    builder.part("data.view")
    return (length, 3, *crop)
