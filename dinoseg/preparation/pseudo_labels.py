"""Pseudo-labels for the frames between the masks of SAR-RARP50's training videos: part of mode=prepare."""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg import build
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import plain
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
from dinoseg.data.pairs.dataset import Pair, read_pair
from dinoseg.errors import DISK_FULL, UserError
from dinoseg.images import read_image, write_png
from dinoseg.report.progress import Bar
from dinoseg.storage import forms
from dinoseg.storage.atomic import whole_folder
from dinoseg.storage.locks import locked
from dinoseg.tracking.propagation.agreement import between
from dinoseg.tracking.propagation.features import last_maps
from dinoseg.tracking.propagation.settings import PropagationSettings
from dinoseg.tracking.provenance import precision_of, weights_of
from dinoseg.tracking.tracker import Autocast

logger = logging.getLogger(__name__)
_LOCK = ".propagate.lock"  # in the folder of a video: one run at a time
_BATCH = 4  # frames that the backbone sees at once
_MEANING = "Labels propagated from the masks before and after a frame; nobody has drawn or checked them."


@dataclass
class Propagation:
    """What gives the frames between two masks their labels."""

    backbone: Any
    settings: PropagationSettings
    device: torch.device
    autocast: Autocast
    reader: MaskReader
    min_agreement: float
    made_by: dict[str, Any]  # what the labels depend on beside frames and masks

    @classmethod
    def of(cls, cfg: Any) -> "Propagation":
        """Return what `backbone`, `tracker`, `engine` and `data` say."""
        engine, settings = instantiate(cfg.engine), instantiate(cfg.tracker)
        backbone = build.backbone(cfg).to(engine.device)
        labels = Labels.of(cfg.data.classes, cfg.data.palette, cfg.data.ignore_index)
        made_by = {
            "backbone": plain(cfg.backbone, resolve=True),
            "weights": weights_of(backbone),
            "tracker": asdict(settings),
            "precision": precision_of(engine.autocast, engine.device),
            "min_agreement": cfg.data.prepare.min_agreement,
            "ignore_index": labels.ignore_index,
        }
        reader = MaskReader(labels, Masks())
        return cls(backbone, settings, engine.device, engine.autocast, reader, cfg.data.prepare.min_agreement, made_by)


def propagate(propagation: Propagation, videos: Sequence[Path]) -> dict[str, dict[str, int]]:
    """Write `pseudo/` into the folders of videos that are extracted at 10 Hz; return the counts of each video.

    A video whose labels are there, made in the same way of the same masks, is left as it is.

    Raises:
        UserError: a full disk, or, when all others are finished, the videos that failed.
    """
    counts: dict[str, dict[str, int]] = {}
    failures = {}
    with Bar(videos, desc="propagating", unit="video") as bar:
        for video in bar:
            name = f"{video.parent.name}/{video.name}"
            bar.set_postfix_str(name)
            try:
                counts[name] = _propagate_video(propagation, video)
            except UserError as error:
                failures[name] = str(error)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                raise UserError(
                    f"The disk of {video} is full: {len(counts)} of {len(videos)} videos have their pseudo-labels and "
                    "nothing is half-written. Make room and run again: it goes on."
                ) from error
    if failures:
        lines = "".join(f"\n- {name}: {reason}" for name, reason in failures.items())
        raise UserError(
            f"{len(failures)} of {len(videos)} videos could not be given pseudo-labels, the others have them:{lines}\n"
            "Running again goes on with these."
        )
    return counts


def _propagate_video(propagation: Propagation, video: Path) -> dict[str, int]:
    with locked(video / _LOCK):
        return _labels_of(propagation, video)


def _labels_of(propagation: Propagation, video: Path) -> dict[str, int]:
    folder = video / PSEUDO_FOLDER
    sums = {"masks": mask_sums(video), "frames": frames_sum(video)}
    made_by = json.loads(json.dumps({**propagation.made_by, **sums}))
    found = _found_before(folder, made_by)
    if found is None:
        for stale in video.glob(f".{PSEUDO_FOLDER}.*"):  # of a run that was killed
            shutil.rmtree(stale, ignore_errors=True)
        found = {"what": _MEANING, "made_by": made_by, "kept": {}, "left_out": {}}
        with whole_folder(folder) as part:
            for stem, mask, agreement in _labelled(propagation, video):
                enough = agreement >= propagation.min_agreement
                found["kept" if enough else "left_out"][stem] = round(agreement, 4)
                if enough:
                    write_png(part / f"{stem}.png", mask)
            (part / PSEUDO_FILE).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return {"pseudo": len(found["kept"]), "left_out": len(found["left_out"])}


def _labelled(propagation: Propagation, video: Path) -> Iterator[tuple[str, np.ndarray, float]]:
    """Yield the stem, the labels and the agreement of each frame that lies between two masks."""
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
    """Return the backbone's last maps (T, C, h, w) of frames (H, W, 3)."""
    seen_as = (propagation.settings, propagation.device, propagation.autocast)
    starts = range(0, len(images), _BATCH)
    return torch.cat([last_maps(propagation.backbone, images[start : start + _BATCH], *seen_as) for start in starts])


def _found_before(folder: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """Return what an earlier run noted, if it did the same and all its files are there."""
    try:
        found = forms.read_json(folder / PSEUDO_FILE, PSEUDO_FORM)
        if found["made_by"] == made_by and found["kept"].keys() == png_files(folder).keys():
            return found
    except FileNotFoundError:
        return None
    except (OSError, forms.Misshapen) as error:
        logger.warning("%s is damaged (%s).", folder / PSEUDO_FILE, error)
    logger.info("%s was made in another way, or is not whole: making it anew.", folder)
    return None
