"""mode=predict: segmentation of an image, folder, glob pattern or video with a trained model."""

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.checkpoints.trained import load_trained, longest_is_typed
from dinoseg.checkpoints.unread import warn_unread
from dinoseg.config.composition import SHIPPED
from dinoseg.config.job import mask_keys
from dinoseg.config.options import has_options
from dinoseg.core.channels import PixelFormat
from dinoseg.core.contracts import require_classes
from dinoseg.core.objects import MIN_SCORE
from dinoseg.core.sources import first_file, has_own_file
from dinoseg.core.splits import SPLITS
from dinoseg.core.task import ObjectTask, Task, refuse_layers
from dinoseg.data.classes.labels import Labels
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.splits import find_groups
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.settings import check_same_settings
from dinoseg.inference.class_record import MASK_FOLDER, write_class_record
from dinoseg.inference.image_run import ImageInput, ImageRun, SegmentationSettings, segment_images
from dinoseg.inference.inputs import find_inputs
from dinoseg.inference.outputs import FurtherOutputs, check_outputs, image_writers
from dinoseg.inference.results import (
    COUNT_FILE,
    DoneInputs,
    check_failures,
    mask_names,
    result_names,
    write_counts,
)
from dinoseg.inference.stream import Throughput
from dinoseg.inference.videos import VideoInput, VideoOptions, VideoSegmenter
from dinoseg.runs.folder import find_typed_keys
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import stamp
from dinoseg.utils.mask_files import write_masks
from dinoseg.utils.ranges import Count, Natural, Share
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)
GROUP = "data.group"
REFERENCES = "references"  # in a run folder: reference masks of the predicted split, as class IDs
_RECORD = "predict.json"  # in a run folder: what its results depend on; needed to resume with the same command
_ANY = forms.table(forms.plain)
_SETTINGS = ("resolution", "task", "backbone", "adapter", "head", "inference")


def predict(
    cfg: DictConfig,
    *,
    out_dir: Path,
    input: str | Natural | None,
    masks: bool | None,
    opacity: Share,
    batch_size: Count,
    min_score: Share = MIN_SCORE,
    frames: Count | None = None,
    outputs: Sequence[str] = (),
    shapes: FurtherOutputs | None = None,
    videos: VideoSegmenter | None = None,
) -> dict[str, Any]:
    """Segment every input at its own size into `out_dir`; return counts and rates.

    `input` may also be a split of the dataset. Then masks/<name>.png has the split's names, and references/<name>.png
    the class IDs of its own masks, so that mode=score can compare the two folders.

    An image results in the folder <stem>_segmentation and class IDs in masks/<name>.png, with masks/classes.json for
    mode=score (`masks` false: none). With task=multilabel, masks/<class>/<name>.png holds 0 and 1 for each class. A
    video results in <stem>_overlay.mp4 and, with `masks` true, the class IDs of each frame in <stem>_masks/%09d.png.

    `outputs` names further results: a folder each for images, and <stem>_palette and so on for the frames of a video.
    `shapes` converts class IDs to shapes for annotation tools, and `videos` segments videos; None: there are none.
    Unreadable inputs are skipped, and listed at the end. In a folder with results of the same model and settings, the
    run resumes where it stopped.

    Raises:
        UserError: nothing can be read, some inputs failed, or the folder holds results of other settings.
    """
    if input is None or input == "":
        raise UserError("mode=predict needs something to segment: give input=<image, folder, glob or video>.")
    check_outputs(outputs, shapes)
    builder = Builder(cfg)
    split = _split_data(builder, input)
    images, video_inputs = _find_inputs(input, builder.pixels, videos, split, outputs)
    if not images and videos is not None:
        videos.check(video_inputs, batch_size)
    options = VideoOptions(masks is True, frames, tuple(outputs))
    trained = load_trained(builder)
    require_classes(trained.model.head, f"resume={builder.resume}")
    _check_unread(out_dir, trained.model.task, outputs, shapes, has_videos=bool(video_inputs))
    display = _select_display_options(options, opacity, shapes, min_score)
    record = _settings(builder, display, out_dir, trained.model.task)
    record["data.palette"] = [list(colour) for colour in trained.palette]
    _check_earlier(out_dir, record)
    if not longest_is_typed(out_dir):
        trained.limit_size()
    labels = Labels.of(trained.classes, trained.palette, trained.ignore_index)
    layers = labels.classes if trained.model.task.has_layers else ()
    _check_outputs_of_layers(trained.model.task, outputs)
    settings = SegmentationSettings(trained.predictor, labels, opacity, batch_size, builder.pixels, layers, min_score)
    background = builder.background if outputs and images else None
    writers = image_writers(outputs, out_dir, labels, background, shapes, trained.model.task)
    mask_folder = None if masks is False else out_dir / MASK_FOLDER
    run = ImageRun(out_dir, mask_folder, DoneInputs(out_dir), list(writers.values()))
    write_json(out_dir / _RECORD, record)
    targets = mask_names([path for path, _ in images], str(input)) if split is None else split.names
    facts = (labels.classes, labels.palette, labels.ignore_index)
    keys = mask_keys(cfg.data) if split is None else {}  # references of a split are already class IDs
    if run.masks is not None and images:  # before the masks: a killed run leaves none without a group
        of_images = _group_images(builder, targets, of_data=split is not None, folder=out_dir)
        write_class_record(run.masks, *facts, keys, has_layers=bool(layers), groups=of_images)
    totals = _segment_images(settings, images, targets, run)
    if videos is not None:
        totals |= _segment_videos(videos, settings, video_inputs, run, options)
    if split is not None and run.masks is not None:
        _write_references(split, out_dir / REFERENCES, layers)
    for video in video_inputs if options.masks else ():
        masks_of = out_dir / f"{video.name}_masks"
        if masks_of.is_dir():
            groups = {path.stem: video.name for path in masks_of.rglob("*.png")}
            write_class_record(masks_of, *facts, keys, has_layers=bool(layers), groups=groups)
    check_failures(run.failures, len(images) + len(video_inputs), run.folder)
    reference = None if split is None else out_dir / REFERENCES
    ids = None if shapes is None else shapes.ids
    print("\n".join(_summary_lines(run, totals, masks is True, outputs, reference, settings, ids)))
    return {**totals, "run": str(out_dir)}


def _find_inputs(
    source: str | int,
    pixels: PixelFormat,
    videos: VideoSegmenter | None,
    split: PairDataset | None,
    outputs: Sequence[str],
) -> tuple[list[tuple[Path, str]], list[VideoInput]]:
    """Return the images with the names of their results, and the videos, of an input, or the images of a `split`.

    Raises:
        UserError: as `find_inputs`, or videos do not have an output.
    """
    if split is not None:
        return _images_of(split), []
    images, found = find_inputs(str(source), pixels, () if videos is None else videos.suffixes)
    if found:
        check_outputs(outputs, None, str(found[0][0]))
    return images, [VideoInput(name, path) for path, name in found]


def _split_data(builder: Builder, source: str | int) -> PairDataset | None:
    """Return the dataset of the split that an input names; None if it names a path.

    Raises:
        UserError: its images are not files, or the dataset has a fault.
    """
    if source not in SPLITS or Path(str(source)).exists():
        return None
    data = builder.dataset(str(source))
    if not isinstance(data, PairDataset) or not all(has_own_file(pair.image) for pair in data.pairs):
        raise UserError(
            f"input={source}: the images of data={builder.options['data']} are not files. Use mode=eval instead."
        )
    return data


def _images_of(data: PairDataset) -> list[tuple[Path, str]]:
    """Return the images of a split with the names of their results."""
    paths = [first_file(pair.image) for pair in data.pairs]
    return list(zip(paths, result_names(paths), strict=True))


def _group_images(builder: Builder, names: Sequence[str], *, of_data: bool, folder: Path) -> dict[str, str | None]:
    """Return the group of each image, None without one; warn if the pattern does not fit.

    The dataset's pattern is for the names of its own images: others (`of_data` false) need a typed `data.group`.
    """
    pattern = builder.value(GROUP) if of_data or GROUP in find_typed_keys(folder) else None
    groups, notes = find_groups(pattern, names, GROUP)
    for note in notes:
        logger.warning("%s", note)
    return {name: groups.get(name) for name in names}


def _check_outputs_of_layers(task: Task, outputs: Sequence[str]) -> None:
    """Refuse outputs that need one class per pixel, for a model that predicts layers."""
    for name in outputs:
        if name != "probabilities":
            refuse_layers(task, f"mode.outputs={name}", "Leave it out: masks has a PNG for each class.")


def _check_unread(
    folder: Path, task: Task, outputs: Sequence[str], shapes: FurtherOutputs | None, *, has_videos: bool
) -> None:
    """Refuse typed minimum scores of objects for a model without any; log what these outputs leave out."""
    for key in find_typed_keys(folder):
        if key in ("mode.min_score", "mode.shapes.min_score") and not isinstance(task, ObjectTask):
            raise UserError(f"{key} is for a model of objects (task=instance or panoptic). Leave it out.")
    if has_videos and isinstance(task, ObjectTask):
        logger.info("Videos show the classes of their pixels, and no objects. mode=track input=VIDEO follows objects.")
    if shapes is not None and not {*outputs} & {*shapes.names}:
        warn_unread(folder, ["mode.shapes"], f"Only outputs read it: mode.outputs=[{','.join(shapes.names)}].")


def _select_display_options(
    options: VideoOptions, opacity: float, shapes: FurtherOutputs | None, min_score: float
) -> dict[str, Any]:
    """Return the options of the mode that results depend on."""
    shown: dict[str, Any] = {"masks": options.masks, "opacity": opacity, "frames": options.frames}
    shown["min_score"] = min_score
    if options.outputs:
        shown |= {"outputs": list(options.outputs), "shapes": None if shapes is None else vars(shapes)}
    return shown


def _write_references(split: PairDataset, folder: Path, layers: Sequence[str]) -> None:
    """Write the class IDs of a split's own masks."""
    for index, name in enumerate(split.names):
        write_masks(folder, name, split.mask(index), layers)


def _settings(builder: Builder, options: dict[str, Any], folder: Path, task: Task) -> dict[str, Any]:
    """Return the settings that results depend on, in addition to their inputs; `task` of the loaded model."""
    weights = None if builder.resume is None else list(stamp(Path(builder.resume)) or ())
    model = {key: builder.settings(key) for key in _SETTINGS if builder.value(key) is not None}
    if model.get("task", {}).get("threshold") == "auto":
        model["task"]["threshold"] = task.thresholds
    # a typed size also applies to large images, even if it equals that of the checkpoint
    typed = {"resolution.longest on the command line": True} if longest_is_typed(folder) else {}
    pixels = {
        "data.channels" if name == "channels" else f"data.pixels.{name}": value
        for name, value in builder.pixels.as_dict().items()
    }
    members = [_settings(member, {}, folder, task) for member in builder.members]
    others = {"members": members} if members else {}
    return {"resume": builder.resume, "stamp": weights, **model, **pixels, **typed, "mode": options, **others}


def _check_earlier(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse another model or other settings than those of the results that an earlier run left in this folder."""
    try:
        before = forms.read_json(folder / _RECORD, _ANY)
    except FileNotFoundError:
        return
    except forms.SchemaError as error:
        raise UserError(f"{folder / _RECORD} is damaged ({error}). Choose another run folder.") from None
    if before.get("stamp") != settings["stamp"]:  # one file may have several paths
        raise UserError(
            f"{folder} holds predictions of another model: {before.get('resume')}, before that file changed or was "
            f"replaced by {settings['resume']}. Use another run folder for this one."
        )
    check_same_settings(folder, {**before, "resume": settings["resume"]}, settings, key="hydra.run.dir")


def _segment_images(
    settings: SegmentationSettings, images: Sequence[tuple[Path, str]], targets: Sequence[str], run: ImageRun
) -> dict[str, Any]:
    if not images:
        return {}
    given = [ImageInput(path, name, target) for (path, name), target in zip(images, targets, strict=True)]
    earlier, throughput = segment_images(settings, given, run)
    _log("images", throughput, count_of(run.count - earlier, "image"))
    task = settings.predictor.model.task
    totals: dict[str, Any] = {"images": run.count, "images_per_s": (run.count - earlier) / throughput.seconds}
    if isinstance(task, ObjectTask):
        if run.undrawn:
            logger.info("%s", _undrawn_line(run.undrawn, run.count - earlier, task, settings.min_score))
        things = {thing: settings.labels.classes[thing] for thing in sorted(task.things)}
        totals["objects"] = write_counts(run.folder, [name for _, name in images if run.done.is_done(name)], things)
    return totals


def _segment_videos(
    videos: VideoSegmenter,
    settings: SegmentationSettings,
    video_inputs: list[VideoInput],
    run: ImageRun,
    options: VideoOptions,
) -> dict[str, Any]:
    frames, seconds, earlier = 0, 0.0, 0
    for video in video_inputs:
        try:
            throughput = videos.segment(settings, video, run, options)
        except UserError as error:
            run.failures.append(str(error))
            continue
        if throughput is None:
            earlier += 1
            continue
        frames, seconds = frames + throughput.items, seconds + throughput.seconds
        _log(video.name, throughput, count_of(throughput.items, "frame"))
    if earlier:
        logger.info("%s of an earlier run reused", count_of(earlier, "video"))
    return {"frames": frames, "frames_per_s": frames / seconds} if frames else {}


def _log(what: str, throughput: Throughput, count: str) -> None:
    if not throughput.items:
        return
    rate = throughput.items / throughput.seconds
    logger.info(
        "%s: %s in %.1f s including reading and writing: %.2f per second", what, count, throughput.seconds, rate
    )
    if report := throughput.report():
        logger.info("%s: %s", what, report)


def _undrawn_line(scores: Sequence[float], count: int, task: ObjectTask, min_score: float) -> str:
    """Return how many of the images have an overlay without objects, and what to do.

    Args:
        scores: the highest one of each of these images.
        count: number of all images.
        task: of the model.
        min_score: score from which objects are shown.
    """
    is_found = task.overlap or max(scores) > 0  # a segment scores more than task.score_threshold
    key = "mode.min_score shows more objects" if is_found else "task.score_threshold finds more segments"
    return (
        f"Overlays that show no object: {len(scores)} of {count}. They show scores of {min_score:g} or more, and the "
        f"highest there is {max(scores):.2f}. If the images have objects, train longer; a lower {key}."
    )


def _score_line(run: ImageRun, reference: Path | None, layers: Sequence[str]) -> str:
    """Return the command that scores the masks of a run."""
    protocol = ("protocol=multilabel",) if layers else ()
    words = ("mode=score", *protocol, f"prediction={run.folder}", f"reference={reference or 'FOLDER'}")
    names = "" if reference else "  # FOLDER: masks of the same names"
    return f"score them:   python -m dinoseg {shlex.join(words)}{names}"


def _score_objects_line(run: ImageRun, task: ObjectTask, outputs: Sequence[str], ids: str | None) -> str:
    """Return the command that scores the objects of a run, or how to write them for it.

    Args:
        run: the run.
        task: of the model.
        outputs: names of the further outputs.
        ids: JSON file whose ids they have.
    """
    output, file, protocol = task.scored_file
    if output in outputs and ids is not None:
        words = ("mode=score", f"protocol={protocol}", f"prediction={run.folder / output / file}", f"reference={ids}")
        return f"score these:  python -m dinoseg {shlex.join(words)}"
    return (
        f"score these:  predict with mode.outputs=[{output}] mode.shapes.ids=FILE.json, COCO's annotations of these "
        "images, so that the results have its ids"
    )


def _summary_lines(
    run: ImageRun,
    totals: Mapping[str, Any],
    video_masks: bool,
    outputs: Sequence[str],
    reference: Path | None,
    settings: SegmentationSettings,
    ids: str | None,
) -> Iterator[str]:
    """Yield a summary line for each kind of result; `reference` is the folder of reference masks, or unknown."""
    if run.count:
        yield f"overlays:     {run.folder}/*_segmentation, of {count_of(run.count, 'image')}"
        if run.masks is not None:
            count = count_of(run.count, "PNG")
            files = f"/CLASS, {count} of 0 and 1 for each class" if settings.layers else f", {count} of class ids"
            yield f"masks:        {run.masks}{files}"
            if has_options([SHIPPED], "mode=score"):
                yield _score_line(run, reference, settings.layers)
    task = settings.predictor.model.task
    if run.count and isinstance(task, ObjectTask):
        listed = ", ".join(f"{count:,} {name}" for name, count in totals["objects"].items())
        counted = (
            f"without duplicates, of scores of {settings.min_score:g} or more; of each image: {run.folder / COUNT_FILE}"
        )
        yield f"objects:      {listed}, {counted}"
        if has_options([SHIPPED], "mode=score"):
            yield _score_objects_line(run, task, outputs, ids)
    if run.count and outputs:
        yield f"also:         {', '.join(str(run.folder / name) for name in outputs)}"
    if totals.get("frames"):
        further = "".join(f", *_{name}" for name in (*["masks"] * video_masks, *outputs))
        yield f"videos:       {run.folder}/*_overlay.mp4{further}, {count_of(totals['frames'], 'frame')}"
