"""Builder of the parts of a training for estimates and trials, from a config and overrides."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dinoseg.experiment.builder import Builder
from dinoseg.models.model import SegmentationModel
from dinoseg.training.parts import TrainingParts
from dinoseg.training.trainer import Settings
from dinoseg.utils.errors import UserError

_NEVER = 10**9  # steps
_QUANTISED = (4, 8)  # bits


def training_parts(build: Builder, overrides: Mapping[str, Any] | None = None) -> TrainingParts:
    """Return the parts of a config's training, for estimates and trials; see `check_trainer`.

    Args:
        build: of the whole config.
        overrides: new values of keys and groups.

    Raises:
        UserError: the crop is invalid, or the shape of a sample is unknown.
    """
    build = build.with_options(overrides) if overrides else build
    bits = build.value("adapter.bits")
    whole = build.with_changes({"adapter": {"bits": None}}) if bits in _QUANTISED else build

    def outline() -> SegmentationModel:
        model = whole.outline()
        whole.name_weights(model)
        return model

    def settings(steps: int) -> Settings:
        return build.part("trainer.loop")(steps=steps, val_every=_NEVER, save_every=None, max_minutes=None)

    shape = _sample_shape(build)
    checkpointing = {name: build.value(f"{name}.checkpointing") for name in ("backbone", "head")}
    return TrainingParts(
        model=partial(build.model, untrained=True),
        outline=outline,
        loss=build.unweighted_loss,
        optimizer=build.optimizer,
        settings=settings,
        schedule=build.schedule,
        shape=shape,
        num_classes=len(build.class_names) if len(shape) == 3 else 0,
        has_layers=build.task.has_layers,
        scale=build.value("resolution.scale"),
        batch_size=build.value("data.batch_size"),
        accumulate=build.value("trainer.accumulate"),
        has_ema=bool(build.value("trainer.ema")),
        bits=bits if bits in _QUANTISED else None,
        seed=build.seed,
        score=build.value("trainer.score"),
        loss_name=build.options["loss"],
        checkpointing={name: value for name, value in checkpointing.items() if value is not None},
    )


def check_trainer(build: Builder) -> None:
    """Refuse trainers with unlabelled images: estimates cover labelled images only.

    Raises:
        UserError: naming the overrides to give instead.
    """
    if "unlabelled" in build.value("trainer"):
        option = build.options["trainer"]
        raise UserError(
            f"trainer={option} is not supported: its step also uses images without masks. Leave trainer out to "
            "estimate the images with masks; a batch of both needs the memory of all its images."
        )


def _sample_shape(build: Builder) -> tuple[int, ...]:
    """Return the shape of a training sample's pixels, (C, H, W) or (T, 3, H, W).

    Raises:
        UserError: the crop is invalid, the data has no clips, or clips have no fixed length.
    """
    crop = build.value("resolution.crop")
    if build.loss_has_classes:
        build.part("data.augment")
        return (build.pixels.channels, *crop)
    if build.value("data.clips") is None:
        raise UserError(f"data={build.options['data']} has no clips. Choose data=davis2017, movi or videos.")
    build.part("data.view")
    length = build.value("data.clips.cut.length")
    if not isinstance(length, int) or length < 1:
        raise UserError(
            f"data.clips.cut.length={length}: the number of frames per clip is needed. Give a number of at least 1."
        )
    return (length, 3, *crop)
