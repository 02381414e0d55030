"""Image segmentation pipeline: decode, predict and write, in batches of one size; unreadable images are skipped."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dinoseg.core.channels import PixelFormat
from dinoseg.core.objects import MIN_SCORE
from dinoseg.core.task import ObjectTask
from dinoseg.data.classes.labels import Labels
from dinoseg.inference.memory import OutOfMemory
from dinoseg.inference.outputs import ImagePrediction, ImageWriter
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.results import OBJECT_FILE, DoneInputs, write_image_results
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.report.progress import Bar
from dinoseg.utils.errors import UserError
from dinoseg.utils.mask_files import mask_paths, write_masks
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)

DEPTH = 2  # batches queued before and after the model


@dataclass(frozen=True)
class SegmentationSettings:
    """Settings of a segmentation run: the predictor, its classes, and how results are displayed.

    Args:
        predictor: predictor of the trained model.
        labels: classes of its IDs.
        opacity: opacity of class colours in overlays, 0..1.
        batch_size: images per batch.
        pixels: format of the images.
        layers: names of classes that have a mask of their own each; empty: masks hold class ids.
        min_score: score from which objects are displayed and listed, 0..1.
    """

    predictor: Predictor
    labels: Labels
    opacity: float = 0.5
    batch_size: int = 4
    pixels: PixelFormat = PixelFormat()
    layers: Sequence[str] = ()
    min_score: float = MIN_SCORE


@dataclass(frozen=True)
class ImageInput:
    """Image to segment: its file, the name of its result folder, and the path of its mask without suffix."""

    path: Path
    name: str
    mask: str


@dataclass
class ImageRun:
    """Output locations and progress of an image segmentation.

    Args:
        folder: the run folder.
        masks: folder of class-ID masks; None: no masks are written.
        writers: writers of further outputs.
        done: inputs that an earlier, stopped run completed in the same folder.
        failures: one message per image that failed.
        undrawn: highest score of each image of a model of objects whose overlay shows none; 0 if none was found.
        count: number of completed images, including those of the earlier run.
    """

    folder: Path
    masks: Path | None
    done: DoneInputs
    writers: Sequence[ImageWriter] = ()
    failures: list[str] = field(default_factory=list)
    undrawn: list[float] = field(default_factory=list)
    count: int = 0


@dataclass(frozen=True)
class _Batch:
    inputs: list[ImageInput]
    images: list[np.ndarray]


def segment_images(
    settings: SegmentationSettings, images: Sequence[ImageInput], run: ImageRun
) -> tuple[int, Throughput]:
    """Write the results of all readable images that are not done; return how many were done, and the throughput.

    Raises:
        OSError: results cannot be written.
    """
    needs_probabilities = any(writer.needs_probabilities for writer in run.writers)

    def infer(batch: _Batch) -> list[ImagePrediction]:
        try:
            return predict_batch(batch)
        except OutOfMemory as error:
            if len(batch.inputs) == 1:
                run.failures.append(f"{batch.inputs[0].path}: {error}")
                return []
        alone = (_Batch([given], [image]) for given, image in zip(batch.inputs, batch.images, strict=True))
        return [prediction for single in alone for prediction in infer(single)]

    def predict_batch(batch: _Batch) -> list[ImagePrediction]:
        results = settings.predictor.predict(batch.images, probabilities=needs_probabilities)
        return [
            ImagePrediction(given.mask, given.path, image, *result)
            for given, image, result in zip(batch.inputs, batch.images, results, strict=True)
        ]

    def write(predictions: list[ImagePrediction]) -> None:
        for prediction in predictions:
            try:
                _write(settings, prediction, names[prediction.path], run)
            except MemoryError:
                run.failures.append(f"{prediction.path}: there is not enough memory to draw its results. Free some.")
            bar.update()

    left = [
        given
        for given in images
        if not run.done.holds(given.name, settings.pixels.source(given.path), _results(settings, given, run))
    ]
    earlier = run.count = len(images) - len(left)
    if earlier:
        logger.info("%s of an earlier run reused", count_of(earlier, "image"))
    names = {given.path: given.name for given in left}
    with Bar(total=len(images), initial=earlier, unit="image") as bar:
        throughput = run_pipeline(_batches(left, settings, run.failures), infer, write, depth=DEPTH)
    for writer in run.writers:
        writer.finish()
    throughput.items = run.count - earlier
    return earlier, throughput


def _write(settings: SegmentationSettings, prediction: ImagePrediction, name: str, run: ImageRun) -> None:
    if run.masks is not None:
        write_masks(run.masks, prediction.name, prediction.ids, settings.layers)
    for writer in run.writers:
        writer.write(prediction)
    objects = None if prediction.objects is None else prediction.objects.select_distinct(settings.min_score)
    write_image_results(
        run.folder / f"{name}_segmentation",
        prediction.image,
        prediction.ids,
        classes=settings.labels.classes,
        palette=settings.labels.palette,
        ignore_index=settings.labels.ignore_index,
        opacity=settings.opacity,
        objects=objects,
    )
    if prediction.objects is not None and not objects:
        run.undrawn.append(max(prediction.objects.scores, default=0))
    run.done.note(name)
    run.count += 1


def _results(settings: SegmentationSettings, given: ImageInput, run: ImageRun) -> list[Path]:
    mask = [] if run.masks is None else mask_paths(run.masks, given.mask, settings.layers)
    folder = run.folder / f"{given.name}_segmentation"
    listed = [folder / OBJECT_FILE] if isinstance(settings.predictor.model.task, ObjectTask) else []
    return [folder, *listed, *mask]


def _batches(images: Sequence[ImageInput], settings: SegmentationSettings, failures: list[str]) -> Iterator[_Batch]:
    """Yield batches of consecutive images of one size and type; unreadable images go to `failures`."""
    batch = _Batch([], [])
    for given in images:
        try:
            image = settings.pixels.read(given.path)
        except UserError as error:
            failures.append(str(error))
            continue
        kinds = {(each.shape, each.dtype) for each in (image, *batch.images[:1])}
        if len(batch.images) == settings.batch_size or len(kinds) > 1:
            yield batch
            batch = _Batch([], [])
        batch.inputs.append(given)
        batch.images.append(image)
    if batch.images:
        yield batch
