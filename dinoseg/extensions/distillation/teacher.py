"""Teacher of a distillation: a trained segmenter that returns class scores of whole images, as in mode=predict."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dinoseg.checkpoints.resume import standalone_config
from dinoseg.checkpoints.trained import restore
from dinoseg.core.contracts import require_classes
from dinoseg.core.shapes import Prediction, SegmentationData
from dinoseg.core.sizes import backbone_size
from dinoseg.experiment.models import ModelBuilder
from dinoseg.extensions.feature_cache.key import code_hash
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.trained_sizes import TrainedSizes, limit_to_trained_size
from dinoseg.models.model import SegmentationModel
from dinoseg.training import checkpoint
from dinoseg.training.engine import Engine
from dinoseg.utils import forms
from dinoseg.utils.devices import to_device
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import open_regular
from dinoseg.utils.units import hash_of
from dinoseg.utils.wording import format_override, format_value, join_names

_KEY = "teacher"  # of the config, which names the checkpoint in messages
TEACHERS = "teachers"  # folder in the cache that holds the scores of all teachers
_CROP = forms.list_of(forms.whole(1), length=2)
_PROBED = 512  # maximum side in backbone pixels of the dummy image that measures cells per pixel
_MIN = -3e4  # lowest score relative to the highest; float16 can hold it


class Teacher:
    """Trained segmenter that scores images with the settings of its own checkpoint; loads it at the first call.

    Args:
        builder: of the student's whole config; `teacher` names a run folder or a checkpoint.
        engine: device and precision of the forward passes.
        labels: dataset whose classes the teacher must have.

    Raises:
        UserError: the run does not exist, its classes differ, or its checkpoint is not to be trusted.
    """

    def __init__(self, builder: ModelBuilder, engine: Engine, labels: SegmentationData) -> None:
        self._given = builder.value(_KEY)
        self._engine = engine
        check_named(self._given)
        self._path = checkpoint.find(self._given, "best", key=_KEY)
        self._info = checkpoint.describe(self._path, key=_KEY)
        self._builder = ModelBuilder(standalone_config(self._path, self._info, {}, job=builder.config, key=_KEY))
        self._check_classes(labels)
        mine, theirs = builder.pixels.channels, self._builder.pixels.channels
        if mine != theirs:
            raise UserError(
                f"teacher={self._given} takes images of {theirs} channels, and data.channels={mine}. Choose a teacher "
                f"of {mine} channels, or data.channels={theirs}."
            )
        outline = checkpoint.outline(self._path, key=_KEY)
        with self._name_teacher():
            self._outline = self._builder.check_fits(outline)
            crop = self._builder.settings("resolution")["crop"]
            if not forms.fits(crop, _CROP):
                raise UserError(
                    f"its resolution.crop={format_value(crop)} must be [height, width] in pixels, each at least 1. "
                    "Choose another checkpoint."
                )
            self._digest = self._hash_file()  # last: it reads the whole file
        require_classes(self._outline.head, f"teacher={self._given}")
        self._loaded: tuple[Predictor, tuple[float, float]] | None = None

    @property
    def name(self) -> str:
        """Return a hash that identifies the checkpoint file, wherever it is stored."""
        return f"sha256 {self._digest[:16]}"

    @property
    def parts(self) -> dict[str, str]:
        """Return hashes of everything that the scores of an image depend on, keyed by its name for users."""
        return {
            "teacher": self._digest,
            "code": code_hash([self._outline.backbone, self._outline.head], self.__call__),
            "inference": hash_of(repr(self._builder.settings("inference"))),
            "precision": hash_of(self._engine.precision, self._engine.tf32, self._engine.device.type),
        }

    @torch.no_grad()
    def __call__(self, image: Tensor) -> tuple[Tensor, tuple[float, float]]:
        """Return class scores (K, h, w) float32 of an image (C, H, W), and the share of them that it covers.

        The scores are logits, shifted so that the highest of each cell is 0. If one pass covers the whole image, they
        have the resolution of the head's output. Otherwise, the merged scores have the number of cells that the head
        would have returned.

        Raises:
            UserError: scores are not finite, or memory does not suffice.
        """
        predictor, cells = self._loaded = self._loaded or self._read()
        # windows take images larger than those of the training at full size
        seen = backbone_size((image.shape[-2], image.shape[-1]), 1.0, predictor.model.longest)
        height, width = (max(1, math.ceil(side * of - 1e-6)) for side, of in zip(seen, cells, strict=True))
        pixels = to_device(image[None], predictor.device)
        with self._name_teacher():
            bands = predictor.run_bands(pixels, lambda bands: list(map(_grid_of, bands)), size=(height, width))
        valid = bands[0][1]
        scores = torch.cat([scores for scores, _ in bands], dim=1)
        if not scores.isfinite().all():
            raise UserError(
                f"teacher={self._given} returns scores that are not finite. Check it with mode=eval, or set "
                "engine.precision=fp32."
            )
        return (scores - scores.amax(0)).clamp(min=_MIN), valid

    def _read(self) -> tuple[Predictor, tuple[float, float]]:
        """Return the model as a predictor of images, and its number of cells per pixel along both axes."""
        devices = [self._engine.device] if self._engine.device.type == "cuda" else []
        # the random state is restored: cached scores must not change the student's random numbers
        with self._name_teacher(), torch.random.fork_rng(devices):
            if self._hash_file() != self._digest:
                raise UserError(f"{self._path} has changed since this run started. Start it again.")
            model, _ = restore(self._builder, self._path, key=_KEY)
            strategy = self._builder.part("inference")
            limit_to_trained_size(model, TrainedSizes.from_info(self._info), teacher=f"teacher={self._given}")
            model = model.to(self._engine.device).requires_grad_(False)
            predictor = Predictor(model, self._engine.device, self._engine.autocast, strategy)
            return predictor, self._cells(model)

    @torch.no_grad()
    def _cells(self, model: SegmentationModel) -> tuple[float, float]:
        """Return the number of score cells per pixel of an image that is not reduced, along height and width."""
        most = math.ceil(_PROBED / model.scale)
        height, width = (min(side, most) for side in self._builder.settings("resolution")["crop"])
        with self._engine.autocast():
            shape = (1, model.backbone.channels, height, width)
            seen = model(torch.zeros(shape, dtype=torch.uint8, device=self._engine.device), reduce=False)
        grid = seen.grid if seen.grid is not None else seen.masks.logits if seen.masks is not None else None
        if grid is None:
            return (model.scale / model.patch_size,) * 2
        return grid.shape[-2] * seen.valid[0] / height, grid.shape[-1] * seen.valid[1] / width

    def _check_classes(self, labels: SegmentationData) -> None:
        teacher_classes, data_classes = list(map(str, self._info["classes"])), list(map(str, labels.classes))
        if teacher_classes == data_classes:
            return
        lacking, more = (
            [name for name in data_classes if name not in teacher_classes],
            [name for name in teacher_classes if name not in data_classes],
        )
        differing = [
            *([f"it lacks {join_names(lacking)}"] if lacking else []),
            *([f"it has {join_names(more)}, which the data lacks"] if more else []),
        ]
        raise UserError(
            f"teacher={self._given} has other classes than the data: "
            f"{'; '.join(differing) or f'their order is {join_names(teacher_classes, 20)}'}. A student learns a "
            "teacher's score of each class: train one on data of the same classes in the same order."
        )

    def _hash_file(self) -> str:
        with open_regular(self._path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

    @contextmanager
    def _name_teacher(self) -> Iterator[None]:
        """Put the checkpoint in front of errors, as the user typed it; an OSError becomes a UserError."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{_KEY}={self._given}: {error}") from None
        except OSError as error:
            raise UserError(f"teacher={self._given}: {error.strerror}. Check that file.") from error


def check_named(teacher: Any) -> None:
    """Refuse a teacher that is not the name of a run folder or a checkpoint."""
    if not isinstance(teacher, str):
        raise UserError(
            f"trainer=distil needs a trained model, but teacher={format_override(teacher)}. Set teacher=RUN, a run "
            "folder or a checkpoint with the same classes."
        )


def _grid_of(band: Prediction) -> tuple[Tensor, tuple[float, float]]:
    """Return the scores of a band of one image as a grid (K, h, w), and the share of it that the band covers."""
    if band.grid is not None:
        return band.grid[0].float(), band.valid
    return band.logits()[0].float().clone(), (1.0, 1.0)  # cloned: the next band overwrites this one
