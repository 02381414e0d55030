"""mode=predict: segment an image, a folder, a glob pattern or a video with a trained model."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.build import background_of
from dinoseg.data.classes.labels import Labels
from dinoseg.errors import UserError
from dinoseg.evaluation.score_classes import FOLDER, mask_keys
from dinoseg.inference.annotations import PredictedShapes
from dinoseg.inference.class_record import write_class_record
from dinoseg.inference.image_run import ImageInput, ImageRun, Segmentation, segment_images
from dinoseg.inference.image_writers import image_writers
from dinoseg.inference.inputs import is_video, list_inputs
from dinoseg.inference.results import mask_names, result_names
from dinoseg.inference.trained_sizes import keep_scale
from dinoseg.inference.video_run import segment_video
from dinoseg.ranges import Count, Share
from dinoseg.runs.trained import load_trained, sizes_to_keep
from dinoseg.wording import count_of

logger = logging.getLogger(__name__)


def predict(
    cfg: DictConfig,
    *,
    out_dir: Path,
    input: str | None,
    masks: bool | None,
    opacity: Share,
    batch_size: Count,
    outputs: Sequence[str] = (),
    shapes: PredictedShapes = PredictedShapes(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Segment everything `input` stands for, at its own size, into `out_dir`; return counts and rates.

    An image gives the folder <stem>_segmentation and its class ids as masks/<name>.png, with masks/classes.json as
    mode=score takes them (`masks` false: none); a video <stem>_overlay.mp4 and, with `masks` true, the class ids of
    each frame as <stem>_masks/%09d.png. `outputs` names what is written of images beside, each in a folder of its
    name; `shapes` says how class ids become shapes for annotation tools. What cannot be read is left out, and named at
    the end.

    Raises:
        UserError: nothing can be read, or some inputs failed.
    """
    if not input:
        raise UserError("mode=predict needs something to segment: give input=<image, folder, glob or video>.")
    paths, folder = list_inputs(input), Path(out_dir)
    trained = load_trained(cfg)
    if trained.model.head.slots is not None:
        raise UserError(
            f"resume={cfg.resume} is a model of slots, which knows no classes. mode=track follows its segments "
            "through a video or a folder of frames."
        )
    keep_scale(trained.model, sizes_to_keep(trained, folder))
    labels = Labels.of(trained.classes, trained.palette, trained.ignore_index)
    by = Segmentation(trained.predictor, labels, opacity, batch_size)
    writers = image_writers(outputs, folder, labels, background_of(cfg) if outputs else None, shapes)
    run = ImageRun(folder, None if masks is False else folder / FOLDER, list(writers.values()))
    try:
        totals = _segment_all(by, paths, input, run, masks is True)
        if run.masks is not None and run.count:
            keys = mask_keys(cfg.data)
            write_class_record(run.masks, labels.classes, labels.palette, labels.ignore_index, keys)
    except OSError as error:
        raise UserError(
            f"Cannot write below {out_dir} ({error}). Free some disk space, or choose another hydra.run.dir."
        ) from error
    if run.failures:
        named = "".join(f"\n  {message}" for message in run.failures)
        raise UserError(f"{len(run.failures)} of {len(paths)} inputs failed, the rest is in {out_dir}:{named}")
    print("\n".join(_written(run, totals, masks is True, outputs)))
    return {**totals, "run": str(out_dir)}


def _segment_all(by: Segmentation, paths: list[Path], source: str, run: ImageRun, video_masks: bool) -> dict[str, Any]:
    named = list(zip(paths, result_names(paths), strict=True))
    images = [entry for entry in named if not is_video(entry[0])]
    targets = mask_names([path for path, _ in images], source)
    totals: dict[str, Any] = {}
    if images:
        given = [ImageInput(path, name, target) for (path, name), target in zip(images, targets, strict=True)]
        passed = segment_images(by, given, run)
        logger.info("%s with reading and writing", _rate(run.count, passed.seconds, "image"))
        totals = {"images": run.count, "images_per_s": run.count / passed.seconds}
    frames, seconds = 0, 0.0
    for path, name in named:
        if not is_video(path):
            continue
        try:
            count, took = segment_video(by, path, run.folder, name, masks=video_masks)
        except UserError as error:
            run.failures.append(str(error))
            continue
        frames, seconds = frames + count, seconds + took
        logger.info("%s: %s with reading and writing", path.name, _rate(count, took, "frame"))
    return totals | ({"frames": frames, "frames_per_s": frames / seconds} if frames else {})


def _written(run: ImageRun, totals: Mapping[str, Any], video_masks: bool, outputs: Sequence[str]) -> Iterator[str]:
    """Yield a line for each kind of result."""
    if run.count:
        yield f"pictures:     {run.folder}/*_segmentation, of {count_of(run.count, 'image')}"
        if run.masks is not None:
            yield f"masks:        {run.masks}, {count_of(run.count, 'PNG')} of class ids"
            yield f"score them:   mode=score prediction={run.folder} reference=<folder of masks of the same names>"
    if run.count and outputs:
        yield f"beside:       {', '.join(str(run.folder / name) for name in outputs)}"
    if totals.get("frames"):
        ids = " and *_masks" if video_masks else ""
        yield f"videos:       {run.folder}/*_overlay.mp4{ids}, {count_of(totals['frames'], 'frame')}"


def _rate(count: int, seconds: float, unit: str) -> str:
    return f"{count_of(count, unit)} in {seconds:.1f} s: {count / seconds:.2f} {unit}s/s"
