"""mode=predict: segment an image, a folder, a glob pattern or a video with a trained model."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from dinoseg.errors import UserError
from dinoseg.evaluation.score_classes import FOLDER, mask_keys
from dinoseg.images import read_image, write_png
from dinoseg.inference.class_record import write_class_record
from dinoseg.inference.inputs import is_video, list_inputs
from dinoseg.inference.results import mask_names, result_names, write_image_results
from dinoseg.inference.stream import run_pipeline
from dinoseg.inference.trained_sizes import keep_scale
from dinoseg.inference.video_file import VideoReader, VideoWriter
from dinoseg.ranges import Count, Share
from dinoseg.report.overlay import blend
from dinoseg.report.progress import Bar
from dinoseg.runs.trained import Trained, load_trained, sizes_to_keep
from dinoseg.storage.atomic import whole_folder
from dinoseg.wording import count_of

logger = logging.getLogger(__name__)
_DEPTH = 2  # batches that wait on either side of the model
_Named = tuple[str, np.ndarray]  # what the results are called, and an image (H, W, 3)


def predict(
    cfg: DictConfig, *, out_dir: Path, input: str | None, masks: bool | None, opacity: Share, batch_size: Count
) -> dict[str, Any]:
    """Segment everything `input` stands for, at its own size, into `out_dir`; return counts and rates.

    An image gives the folder <stem>_segmentation and its class ids as masks/<name>.png, with masks/classes.json as
    mode=score takes them (`masks` false: none); a video <stem>_overlay.mp4 and, with `masks` true, the class ids of
    each frame as <stem>_masks/%09d.png. What cannot be read is left out, and named at the end.

    Raises:
        UserError: nothing can be read, or some inputs failed.
    """
    if not input:
        raise UserError("mode=predict needs something to segment: give input=<image, folder, glob or video>.")
    paths = list_inputs(input)
    trained = load_trained(cfg)
    if trained.model.head.slots is not None:
        raise UserError(
            f"resume={cfg.resume} is a model of slots, which knows no classes. mode=track follows its segments "
            "through a video or a folder of frames."
        )
    keep_scale(trained.model, sizes_to_keep(trained, Path(out_dir)))
    job = _Job(trained, Path(out_dir), opacity, batch_size, masks)
    try:
        totals = _segment_all(job, paths, input)
        if job.masks_written:
            palette, ignored = trained.palette, trained.ignore_index
            write_class_record(job.out_dir / FOLDER, trained.classes, palette, ignored, mask_keys(cfg.data))
    except OSError as error:
        raise UserError(
            f"Cannot write below {out_dir} ({error}). Free some disk space, or choose another hydra.run.dir."
        ) from error
    if job.failures:
        named = "".join(f"\n  {message}" for message in job.failures)
        raise UserError(f"{len(job.failures)} of {len(paths)} inputs failed, the rest is in {out_dir}:{named}")
    print("\n".join(_written(job, totals)))
    return {**totals, "run": str(out_dir)}


@dataclass
class _Job:
    trained: Trained
    out_dir: Path
    opacity: float
    batch_size: int
    masks: bool | None  # None: of images alone
    failures: list[str] = field(default_factory=list)
    masks_written: int = 0  # of images


def _segment_all(job: _Job, paths: Sequence[Path], source: str) -> dict[str, Any]:
    named = list(zip(paths, result_names(paths), strict=True))
    images = [entry for entry in named if not is_video(entry[0])]
    targets = dict(zip((name for _, name in images), mask_names([path for path, _ in images], source), strict=True))
    totals = _segment_images(job, images, targets) if images else {}
    frames, seconds = 0, 0.0
    for path, name in named:
        if not is_video(path):
            continue
        try:
            count, took = _segment_video(job, path, name)
        except UserError as error:
            job.failures.append(str(error))
            continue
        frames, seconds = frames + count, seconds + took
        logger.info("%s: %s with reading and writing", path.name, _rate(count, took, "frame"))
    return totals | ({"frames": frames, "frames_per_s": frames / seconds} if frames else {})


def _segment_images(job: _Job, images: Sequence[tuple[Path, str]], targets: Mapping[str, str]) -> dict[str, Any]:
    def infer(batch: list[_Named]) -> tuple[list[_Named], np.ndarray]:
        return batch, job.trained.predictor.ids([image for _, image in batch])

    def write(done: tuple[list[_Named], np.ndarray]) -> None:
        for (name, image), ids in zip(*done, strict=True):
            write_image_results(
                job.out_dir / f"{name}_segmentation",
                image,
                ids,
                classes=job.trained.classes,
                palette=job.trained.palette,
                ignore_index=job.trained.ignore_index,
                opacity=job.opacity,
            )
            if job.masks is not False:
                write_png(job.out_dir / FOLDER / f"{targets[name]}.png", ids)
                job.masks_written += 1
            bar.update()

    with Bar(total=len(images), unit="image") as bar:
        passed = run_pipeline(_readable_batches(job, images), infer, write, depth=_DEPTH)
    count = len(images) - len(job.failures)
    logger.info("%s with reading and writing", _rate(count, passed.seconds, "image"))
    return {"images": count, "images_per_s": count / passed.seconds}


def _readable_batches(job: _Job, images: Sequence[tuple[Path, str]]) -> Iterator[list[_Named]]:
    """Yield runs of images of one size, at most a batch long; what cannot be read becomes a failure."""
    batch: list[_Named] = []
    for path, name in images:
        try:
            image = read_image(path)
        except UserError as error:
            job.failures.append(str(error))
            continue
        if batch and (len(batch) == job.batch_size or batch[0][1].shape != image.shape):
            yield batch
            batch = []
        batch.append((name, image))
    if batch:
        yield batch


def _segment_video(job: _Job, path: Path, name: str) -> tuple[int, float]:
    """Write a video's overlay and masks; return the number of frames and the seconds taken."""
    start = time.perf_counter()
    with ExitStack() as stack:
        reader = stack.enter_context(VideoReader(path))
        folder = stack.enter_context(whole_folder(job.out_dir / f"{name}_masks")) if job.masks else None
        writer = stack.enter_context(VideoWriter(job.out_dir / f"{name}_overlay.mp4", reader.fps, reader.size))
        bar = stack.enter_context(Bar(total=reader.count or None, unit="frame", desc=path.name))

        def infer(frames: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
            return frames, job.trained.predictor.ids(frames)

        def write(done: tuple[list[np.ndarray], np.ndarray]) -> None:
            for frame, ids in zip(*done, strict=True):
                if folder is not None:
                    write_png(folder / f"{writer.frames_written:09d}.png", ids)
                overlay = blend(
                    frame,
                    ids,
                    job.trained.palette,
                    ignore_index=job.trained.ignore_index,
                    opacity=job.opacity,
                )
                writer.write(overlay)
            bar.update(len(ids))

        run_pipeline(_batches(reader, job.batch_size), infer, write, depth=_DEPTH)
    return writer.frames_written, time.perf_counter() - start


def _batches(frames: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    iterator = iter(frames)
    while batch := list(islice(iterator, size)):
        yield batch


def _written(job: _Job, totals: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each kind of result."""
    if totals.get("images"):
        yield f"pictures:     {job.out_dir}/*_segmentation, of {count_of(totals['images'], 'image')}"
    if job.masks_written:
        yield f"masks:        {job.out_dir / FOLDER}, {count_of(job.masks_written, 'PNG')} of class ids"
        yield f"score them:   mode=score prediction={job.out_dir} reference=<folder of masks of the same names>"
    if totals.get("frames"):
        ids = " and *_masks" if job.masks else ""
        yield f"videos:       {job.out_dir}/*_overlay.mp4{ids}, {count_of(totals['frames'], 'frame')}"


def _rate(count: int, seconds: float, unit: str) -> str:
    return f"{count_of(count, unit)} in {seconds:.1f} s: {count / seconds:.2f} {unit}s/s"
