"""Pseudo-labels for the frames between the masks of SAR-RARP50's training videos: part of mode=prepare."""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.contracts import Backbone
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import MaskReader, Masks
from dinoseg.data.formats.sarrarp_files import (
    MASK_FOLDER,
    PSEUDO_FILE,
    PSEUDO_FOLDER,
    PSEUDO_FORM,
    frames_sum,
    gaps,
    mask_sums,
    png_files,
)
from dinoseg.data.pairs.dataset import read_pair
from dinoseg.data.pairs.pair import Pair
from dinoseg.report.progress import Bar
from dinoseg.tasks.preparation.jobs import incomplete, run_jobs
from dinoseg.tracking.grid import propagator
from dinoseg.tracking.propagation.features import last_maps
from dinoseg.tracking.propagation.masks import first_labels, to_mask
from dinoseg.tracking.propagation.settings import DINOV3, PropagationSettings
from dinoseg.tracking.provenance import precision_of, weights_of
from dinoseg.training.engine import Engine
from dinoseg.utils import forms
from dinoseg.utils.atomic import atomic_folder, remove_parts
from dinoseg.utils.errors import UserError
from dinoseg.utils.forms import as_read_back
from dinoseg.utils.images import read_image, write_png
from dinoseg.utils.locks import locked
from dinoseg.utils.units import finished

_LOCK = ".propagate.lock"  # in the folder of a video: one run at a time
_BATCH = 4  # frames per forward pass of the backbone
_MEANING = "Labels propagated from the masks before and after a frame; not checked by a human annotator."


BACKGROUND = 0


@dataclass
class Propagation:
    """Backbone and settings that label the frames between two masks."""

    backbone: Backbone
    settings: PropagationSettings
    engine: Engine
    reader: MaskReader
    min_agreement: float
    made_by: dict[str, Any]  # what the labels depend on, in addition to frames and masks

    @classmethod
    def build(
        cls,
        backbone: Backbone,
        settings: PropagationSettings,
        engine: Engine,
        labels: Labels,
        *,
        min_agreement: float,
        backbone_config: Mapping[str, Any],
    ) -> "Propagation":
        """Return the propagation with a backbone on the engine's device.

        Args:
            backbone: frozen, in eval mode; it is moved to the device.
            settings: of the tracker.
            engine: device and precision.
            labels: classes of the dataset.
            min_agreement: minimum share of pixels on which the propagations from both masks agree.
            backbone_config: resolved config of the backbone; labels are made again if it changes.
        """
        backbone = backbone.to(engine.device)
        made_by = {
            "backbone": dict(backbone_config),
            "weights": weights_of(backbone),
            "tracker": asdict(settings),
            "precision": precision_of(engine.autocast, engine.device),
            "min_agreement": min_agreement,
            "ignore_index": labels.ignore_index,
        }
        return cls(backbone, settings, engine, MaskReader(labels, Masks()), min_agreement, made_by)


def propagate(propagation: Propagation, root: Path, videos: Sequence[str]) -> dict[str, dict[str, int]]:
    """Write `pseudo/` into the folders of videos extracted at 10 Hz; return the counts of each video.

    A video is skipped if its labels exist and were made with the same settings from the same masks and frames.

    Args:
        propagation: labels the frames.
        root: root of the dataset.
        videos: names of folders below it, such as `train1/video_01`.

    Raises:
        UserError: the disk is full, or some videos failed; the latter only after all others are finished.
    """
    work = functools.partial(_label_video, propagation, root)
    with Bar(total=len(videos), desc="propagating", unit="video") as bar:
        counts, failures = run_jobs(
            work, videos, bar, workers=1, root=root, ready="videos have their pseudo-labels", show=str
        )
    if failures:
        lines = [f"{name}: {reason}" for name, reason in failures.items()]
        raise incomplete(
            lines, f"{len(failures)} of {len(videos)} videos could not be given pseudo-labels, the others have them"
        )
    return counts


def _label_video(propagation: Propagation, root: Path, name: str) -> dict[str, int]:
    with locked(root / name / _LOCK):
        return _labels_of(propagation, root / name)


def _labels_of(propagation: Propagation, video: Path) -> dict[str, int]:
    """Return the counts of a video's labels, which are made unless they exist."""
    folder = video / PSEUDO_FOLDER
    sums = {"masks": mask_sums(video), "frames": frames_sum(video)}
    made_by = as_read_back({**propagation.made_by, **sums})

    def is_current(note: Mapping[str, Any]) -> bool:
        return note["made_by"] == made_by and note["kept"].keys() == png_files(folder).keys()

    note = finished(
        folder / PSEUDO_FILE,
        lambda path: forms.read_json(path, PSEUDO_FORM),
        is_current,
        damaged="%s is damaged (%s): creating it again.",
        unfit=f"{folder} was created with other settings, or is incomplete: creating it again.",
    )
    if note is None:
        remove_parts(video, f".{PSEUDO_FOLDER}.*")
        note = _write_labels(propagation, video, made_by)
    return {"pseudo": len(note["kept"]), "left_out": len(note["left_out"])}


def _write_labels(propagation: Propagation, video: Path, made_by: dict[str, Any]) -> dict[str, Any]:
    """Write the labels with sufficient agreement, then the note on them, which is returned."""
    accepted: dict[str, float] = {}
    left_out: dict[str, float] = {}
    # all or nothing: training must not see a part of the labels, or labels of two settings
    with atomic_folder(video / PSEUDO_FOLDER) as part:
        for stem, mask, agreement in _labelled(propagation, video):
            if agreement >= propagation.min_agreement:
                accepted[stem] = round(agreement, 4)
                write_png(part / f"{stem}.png", mask)
            else:
                left_out[stem] = round(agreement, 4)
        note = {"what": _MEANING, "made_by": made_by, "kept": accepted, "left_out": left_out}
        (part / PSEUDO_FILE).write_text(json.dumps(note, indent=1), encoding="utf-8")
    return note


def _labelled(propagation: Propagation, video: Path) -> Iterator[tuple[str, np.ndarray, float]]:
    """Yield the stem, the labels and the agreement of each frame between two masks."""
    for gap in gaps(video):
        ends = [_masked(propagation, video, path) for path in (gap[0], gap[-1])]
        inner = [read_image(path) for path in gap[1:-1]]
        images = [ends[0][0], *inner, ends[1][0]]
        for path, image in zip(gap, images, strict=True):
            if image.shape != images[0].shape:
                raise UserError(
                    f"{path} is {image.shape[0]} x {image.shape[1]}, {gap[0]} is {images[0].shape[0]} x "
                    f"{images[0].shape[1]} (H x W). Extract the frames of this video again."
                )
        agreed = between(
            _features(propagation, images),
            ends[0][1],
            ends[1][1],
            propagation.settings,
            patch_size=propagation.backbone.patch_size,
            ignore_index=propagation.reader.labels.ignore_index,
        )
        for path, (mask, agreement) in zip(gap[1:-1], agreed, strict=True):
            yield path.stem, mask, agreement


def _masked(propagation: Propagation, video: Path, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return a frame (H, W, 3) and its mask (H, W)."""
    sample = read_pair(Pair(path.stem, path, video / MASK_FOLDER / f"{path.stem}.png"), propagation.reader)
    return sample["image"].permute(1, 2, 0).numpy(), sample["mask"].numpy()


@torch.inference_mode()
def _features(propagation: Propagation, images: Sequence[np.ndarray]) -> Tensor:
    """Return the backbone's last feature maps (T, C, h, w) of frames (H, W, 3)."""
    seen_as = (propagation.settings, propagation.engine.device, propagation.engine.autocast)
    starts = range(0, len(images), _BATCH)
    return torch.cat([last_maps(propagation.backbone, images[start : start + _BATCH], *seen_as) for start in starts])


class Agreed(NamedTuple):
    """Labels of one frame on which forward and backward propagation agree.

    `agreement` is the fraction of pixels with equal classes, among those that either direction labels as an object; 1
    if there is none.
    """

    mask: np.ndarray  # (H, W) uint8, ignored where the directions differ
    agreement: float


def between(
    features: Tensor,
    first: np.ndarray,
    last: np.ndarray,
    settings: PropagationSettings = DINOV3,
    *,
    patch_size: int,
    ignore_index: int = 255,
) -> Iterator[Agreed]:
    """Yield labels for frames 1..T-2 from the masks (H, W) uint8 of frames 0 and T-1.

    The grid of the features (T, C, h, w) covers the frames exactly. Ignored pixels of a mask are propagated like a
    class, and are ignored in the result.
    """
    size = (first.shape[0], first.shape[1])
    ways = []
    for seen, mask in ((features, first), (features.flip(0), last)):
        ids, channels = np.unique(mask, return_inverse=True)
        ways.append((ids, _propagated(seen, channels.reshape(size).astype(np.uint8), settings)))
    for number in range(1, len(features) - 1):
        there, back = (
            ids[to_mask(soft[position], size, settings, patch_size=patch_size).cpu().numpy()]
            for position, (ids, soft) in zip((number, len(features) - 1 - number), ways, strict=True)
        )
        yield agree(there, back, ignore_index)


def agree(one: np.ndarray, other: np.ndarray, ignore_index: int = 255) -> Agreed:
    """Return the labels on which two masks (H, W) agree; pixels ignored in either are ignored and not counted."""
    known = (one != ignore_index) & (other != ignore_index)
    same = known & (one == other)
    objects = known & ((one != BACKGROUND) | (other != BACKGROUND))
    mask = np.where(same, one, ignore_index).astype(np.uint8)
    return Agreed(mask, float((same & objects).sum() / objects.sum()) if objects.any() else 1.0)


def _propagated(features: Tensor, channels: np.ndarray, settings: PropagationSettings) -> Tensor:
    """Return the soft labels (T, L, h, w) propagated from frame 0's channels (H, W), numbered from 0."""
    labels = first_labels(torch.from_numpy(channels), (features.shape[2], features.shape[3]), settings)
    return propagator.propagate(features, labels.to(features.device), settings=settings)
