"""mode=example: segmentation of images and videos by a few images with masks, without training."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from dinoseg.checkpoints.trained import is_trained, load_trained
from dinoseg.config.job import mask_keys
from dinoseg.core.channels import check_rgb
from dinoseg.core.task import refuse_layers
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import MaskReader, Masks
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.example.matcher import ExampleMatcher, Rule
from dinoseg.extensions.example.references import ONE_CONCEPT, ONE_CONCEPT_MASKS, read_references
from dinoseg.extensions.feature_views.features_mode import open_bare_model
from dinoseg.extensions.feature_views.patches import PatchFeatures
from dinoseg.extensions.video.length import VIDEO_SUFFIXES, is_video
from dinoseg.extensions.video.run import segment_video
from dinoseg.inference.class_record import MASK_FOLDER, write_class_record
from dinoseg.inference.image_run import ImageInput, ImageRun, SegmentationSettings, segment_images
from dinoseg.inference.inputs import list_inputs
from dinoseg.inference.outputs import Probabilities
from dinoseg.inference.predictor import PixelsAndObjects, Predictor
from dinoseg.inference.results import DoneInputs, check_failures, mask_names, result_names
from dinoseg.inference.videos import VideoInput, VideoOptions
from dinoseg.utils.csv_text import write_csv
from dinoseg.utils.errors import UserError, name_parameters
from dinoseg.utils.images import read_ids
from dinoseg.utils.ranges import Count, Natural, Share
from dinoseg.utils.wording import count_of, join_names

logger = logging.getLogger(__name__)
AREAS = "areas.csv"  # in the run folder
SCORES = "scores"  # in the run folder: of patches
_COLUMNS = ("image", "pixels")  # of AREAS, before those of the concepts


def segment_by_references(
    cfg: DictConfig,
    *,
    out_dir: Path,
    input: str | None,
    references: Sequence[Any] | None,
    rule: Rule,
    rank: Natural | None,
    size: Sequence[Count] | None,
    opacity: Share,
    save: bool,
) -> dict[str, Any]:
    """Segment all images and videos by the concepts of references; return the number of images and frames.

    The features are those of a backbone without adapter or, with `resume`, of a trained model's backbone after it.
    The keys are explained in cfg/mode/example.yaml. The results are those of mode=predict: NAME_segmentation,
    masks/NAME.png with masks/classes.json, and for videos NAME_overlay.mp4 and NAME_masks; also areas.csv and, with
    `save`, scores/NAME.npy.

    Raises:
        UserError: an option does not fit the model, a reference has a fault, or nothing can be read; or some inputs
            failed.
    """
    if not input:
        raise UserError("mode=example needs images to segment: give input=<image, folder, glob or video>.")
    builder = Builder(cfg)
    refuse_layers(builder.task, "mode=example", "Give data whose pixels have one class, or leave task and resume out.")
    paths = list_inputs(input, suffixes=builder.pixels.suffixes, videos=VIDEO_SUFFIXES)
    labels, masks, background = _find_labels(builder)
    concepts = [number for number in range(len(labels.classes)) if number != background]
    found = read_references(references, MaskReader(labels, Masks(**masks)), builder.pixels, background, concepts)
    shown = [any(reference.masks[place].any() for reference in found) for place in range(1, len(concepts) + 1)]
    if unseen := [labels.classes[number] for number, is_shown in zip(concepts, shown, strict=True) if not is_shown]:
        logger.warning("No reference shows %s: these classes are not segmented.", join_names(unseen))
    if is_trained(builder):
        trained = load_trained(builder)
        model, engine = trained.model, trained.engine
    else:
        engine = builder.engine()
        model = open_bare_model(builder, -1, engine)
    with name_parameters({"rank": "mode.rank", "size": "mode.size"}):
        features = PatchFeatures(model, engine.device, engine.autocast, rank=rank)
        matcher = ExampleMatcher(features, found, rule=rule, size=size)
    ids = np.array([labels.ignore_index if background is None else background, *concepts], np.uint8)
    predictor = ExamplePredictor(model, engine.device, engine.autocast, matcher=matcher, class_ids=ids)
    settings = SegmentationSettings(predictor, labels, opacity, batch_size=1, pixels=builder.pixels)
    writers = [Probabilities(out_dir / SCORES)] if save else []
    run = ImageRun(out_dir, out_dir / MASK_FOLDER, DoneInputs(out_dir), writers)
    frames, videos = _segment(settings, run, paths, input, masks)
    empty = _write_areas(run, videos, [labels.classes[number] for number in concepts], concepts)
    return _finish(run, empty, len(paths), frames, save=save)


@dataclass(frozen=True, kw_only=True)
class ExamplePredictor(Predictor):
    """Predictor of the classes of pixels by a matcher, whose scores of patches take the place of probabilities.

    Args:
        matcher: finds the concepts.
        class_ids: class id of no concept and of each concept (K + 1,) uint8.
    """

    matcher: ExampleMatcher
    class_ids: np.ndarray

    def predict(self, images: Sequence[np.ndarray], *, probabilities: bool = False) -> list[PixelsAndObjects]:
        """Return the class ids of each image (H, W, C), and the scores (K, h, w) float32 of its patches."""
        found = map(self.matcher, images)
        return [
            PixelsAndObjects(self.class_ids[each.concepts], torch.from_numpy(each.scores.astype(np.float32)), None)
            for each in found
        ]


def _find_labels(builder: Builder) -> tuple[Labels, dict[str, Any], int | None]:
    """Return the classes, the encoding of masks as arguments of `Masks`, and the class id of the background, if any.

    Without classes, any value above 0 in a mask is one concept.
    """
    data = builder.cfg.data
    if OmegaConf.is_interpolation(data, "classes") and OmegaConf.is_missing(data, "root"):
        return ONE_CONCEPT, ONE_CONCEPT_MASKS, 0
    return builder.labels, mask_keys(data), builder.background


def _segment(
    settings: SegmentationSettings, run: ImageRun, paths: Sequence[Path], source: str, masks: dict[str, Any]
) -> tuple[int, list[str]]:
    """Write the results of all inputs that can be read; return the number of frames, and the names of the videos."""
    named = list(zip(paths, result_names(paths), strict=True))
    images = [(path, name) for path, name in named if not is_video(path)]
    labels, frames = settings.labels, 0
    videos = []
    record = (labels.classes, labels.palette, labels.ignore_index, masks)
    if images and run.masks is not None:
        targets = mask_names([path for path, _ in images], source)
        write_class_record(run.masks, *record)
        segment_images(settings, [ImageInput(*each, mask) for each, mask in zip(images, targets, strict=True)], run)
    for path, name in named:
        if not is_video(path):
            continue
        check_rgb(settings.pixels, f"the video {path}")
        try:
            throughput = segment_video(settings, VideoInput(name, path), run, VideoOptions(masks=True))
        except UserError as error:
            run.failures.append(str(error))
            continue
        frames += 0 if throughput is None else throughput.items
        write_class_record(run.folder / f"{name}_masks", *record)
        videos.append(name)
    return frames, videos


def _write_areas(run: ImageRun, videos: Sequence[str], names: Sequence[str], concepts: Sequence[int]) -> list[str]:
    """Write the pixels of each concept in each mask of the run folder; return the names of masks without any."""
    folders = {"": run.folder / MASK_FOLDER, **{f"{video}/": run.folder / f"{video}_masks" for video in videos}}
    rows: list[list[Any]] = []
    for prefix, folder in folders.items():
        for path in sorted(folder.rglob("*.png")):
            ids = read_ids(path)
            counts = np.bincount(ids.ravel(), minlength=256)[list(concepts)]
            rows.append([prefix + path.relative_to(folder).with_suffix("").as_posix(), ids.size, *counts.tolist()])
    heads = [f"{name} (class)" if name in _COLUMNS else name for name in names]
    write_csv(run.folder / AREAS, [[*_COLUMNS, *heads], *rows])
    return [row[0] for row in rows if not any(row[len(_COLUMNS) :])]


def _finish(run: ImageRun, empty: Sequence[str], inputs: int, frames: int, *, save: bool) -> dict[str, Any]:
    """Print where results are; return the numbers of images and frames."""
    check_failures(run.failures, inputs, run.folder)
    if run.count:
        print(f"overlays:     {run.folder}/*_segmentation, of {count_of(run.count, 'image')}")
        print(f"masks:        {run.masks}, {count_of(run.count, 'PNG')} of class ids")
    if frames:
        print(f"videos:       {run.folder}/*_overlay.mp4, *_masks, {count_of(frames, 'frame')}")
    print(f"areas:        {run.folder / AREAS}{f', scores of patches: {run.folder / SCORES}' if save else ''}")
    if empty:
        print(f"empty masks:  {count_of(empty, 'mask')} without a match: {join_names(empty)}")
    return {"images": run.count, "frames": frames, "empty": len(empty), "run": str(run.folder)}
