"""mode=track: tracking of objects through a video, from the mask of its first frame or with a trained model."""

import logging
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.checkpoints.trained import find_trained_sizes, is_trained, load_trained
from dinoseg.checkpoints.unread import warn_unread
from dinoseg.core.channels import check_rgb
from dinoseg.core.task import ObjectTask, refuse_layers
from dinoseg.data.classes.labels import Labels, as_color
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.settings import check_same_settings
from dinoseg.extensions.annotations.coco_ids import CocoIds
from dinoseg.extensions.clips.videos import VOID
from dinoseg.extensions.tracking.tracker import Tracker
from dinoseg.extensions.tracking.trackers import tracker_maker
from dinoseg.extensions.tracking.video.labels import TrackLabels, find_labels
from dinoseg.extensions.tracking.video.mask_folder import MaskColours
from dinoseg.extensions.tracking.video.report import write_results
from dinoseg.extensions.tracking.video.run import TrackJob, track_video
from dinoseg.extensions.tracking.video.state import (
    STATE,
    TrackProgress,
    TrackState,
    check_unfinished,
    read_track_state,
)
from dinoseg.extensions.tracking.video.track_files import TrackFiles, TrackFormat
from dinoseg.extensions.video.frames import FrameReader, open_frames
from dinoseg.runs.folder import RunFolder
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Natural, Share
from dinoseg.utils.wording import count_of, format_value

logger = logging.getLogger(__name__)
_PURPOSES = {  # of options that only some models have
    "smoothing": "the classes of a trained segmenter without single objects (resume=RUN, or a head released trained)",
    "keep": "single objects of a trained model (task=instance or panoptic)",
    "min_score": "single objects of a trained model (task=instance or panoptic)",
}


def track(
    cfg: DictConfig,
    *,
    out_dir: Path,
    input: str | None,
    labels: str | None,
    restart: str | None,
    save_every: Count,
    batch_size: Count,
    opacity: Share,
    outline: Natural | None,
    palette: Sequence[Sequence[int]] | None,
    smoothing: Share | None,
    keep: Natural | None,
    min_score: Share | None,
    outputs: Sequence[TrackFormat] = (),
    ids: str | None = None,
) -> dict[str, Any]:
    """Track the objects of `labels` through `input`; return counts and rates.

    Without a trained model, labels are propagated by the similarity of backbone features. A trained segmenter, from
    `resume` or released, predicts the classes of each frame, smoothed over time by `smoothing` (None: 0.5). A model of
    single objects gives those of at least `min_score` (None: 0.5) an ID, which ends after `keep` frames (None: 30)
    without the object. A slot model tracks its own segments or, with `labels`, the objects.

    Writes masks/<frame>.png (IDs with `palette`), overlay.mp4, objects.csv and, at the end, track.json. `outputs` adds
    files of the tracks, with the ids of a JSON file `ids` of YouTube-VIS. They go to `out_dir`, or to the folder of the
    unfinished run that `restart` names.

    Raises:
        UserError: an option is out of range, or input, labels or the run to resume cannot be used.
    """
    builder = Builder(cfg)
    options = {"smoothing": smoothing, "keep": keep, "min_score": min_score}
    if not is_trained(builder):
        _check_options(options, ())
    check_rgb(builder.pixels, f"a frame of {input}")
    given = _read_palette(palette)
    folder = Path(out_dir if restart is None else restart).expanduser()
    with _unfinished_run(folder, restart) as state:
        frames, masks = _open_input(input, labels, needs_labels=not is_trained(builder))
        with frames:
            tracker, colours = _build_tracker(builder, batch_size, options, labels, out_dir)
            colours = replace(colours, palette=(*given, *colours.palette[len(given) :]))
            files = _plan_files(outputs, ids, frames.path, colours)
            warn_unread(out_dir, tracker.unread, tracker.unread_because)
            if not outputs:
                warn_unread(
                    out_dir, ["mode.ids"], "Only files of tracks have ids: set mode.outputs=[mots,youtube_vis]."
                )
            start = None if state is None else _go_on(tracker, state, folder)
            job = TrackJob(tracker, frames, masks, folder, start, batch_size, save_every, colours)
            with _resume_note(folder):
                return write_results(job, track_video(job), str(input), opacity, outline, files)


def _read_palette(palette: Sequence[Sequence[int]] | None) -> tuple[tuple[int, int, int], ...]:
    try:
        return tuple(map(as_color, palette or ()))
    except UserError as error:
        raise UserError(f"mode.palette={format_value(palette)}: {error}") from None


def _plan_files(outputs: Sequence[TrackFormat], ids: str | None, source: Path, colours: MaskColours) -> TrackFiles:
    """Return the files of the tracks, after the checks that are possible before tracking."""
    if outputs and colours.background is None:
        raise UserError(
            f"mode.outputs=[{','.join(outputs)}] is for objects, and the model predicts classes. Leave it out."
        )
    known = CocoIds.read(ids, Labels(colours.classes, tuple(colours.palette), VOID), "mode.ids", "videos")
    name = source.name if source.is_dir() else source.stem
    known.find_image(name)  # of a reference that lacks it
    return TrackFiles(outputs, name, known)


@contextmanager
def _resume_note(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"Cannot write below {folder} ({error}). Free some space; {_next_run(folder)}.") from error
    except KeyboardInterrupt:
        logger.warning("Stopped: %s.", _next_run(folder))
        raise


def _next_run(folder: Path) -> str:
    """Return what the same command does next, given the files that a stopped run has left."""
    if (folder / STATE).is_file():
        return f"the same command with {shlex.quote(f'mode.restart={folder}')} resumes"
    return "the same command starts over, since no state was saved yet (mode.save_every)"


def _open_input(input: str | None, labels: str | None, *, needs_labels: bool) -> tuple[FrameReader, TrackLabels]:
    """Return frames and masks, after the checks that are possible before tracking."""
    if not input:
        raise UserError("mode=track needs a video: set input=<video or folder of frames>.")
    if needs_labels and not labels:
        raise UserError(
            "mode=track needs the objects to track: set labels=<mask of the first frame, or folder of masks named like "
            "frames>."
        )
    frames = open_frames(input)
    masks = find_labels(labels, frames)
    first = masks.read(0)
    if first is not None and len(masks.files) == 1 and not first.any():
        raise UserError(f"labels={labels} has no object: all pixels are 0, the background. Draw the objects to track.")
    if 1 < len(masks.files) == frames.count:
        logger.warning(
            "labels=%s has a mask for every frame, and each replaces the tracked mask. To track from the first one "
            "only, give its file.",
            labels,
        )
    return frames, masks


def _build_tracker(
    builder: Builder, batch_size: int, options: Mapping[str, float | None], labels: str | None, out_dir: Path
) -> tuple[Tracker, MaskColours]:
    """Return the tracker, and how its masks are displayed.

    Raises:
        UserError: the model does not support an option or `labels`, or the tracker cannot be built.
    """
    if not is_trained(builder):
        return tracker_maker(builder, builder.engine(), batch_size=batch_size)(), MaskColours()
    trained = load_trained(builder)
    if trained.model.head.no_classes is not None:
        _check_options(options, ())
        make_tracker = tracker_maker(builder, trained.engine, trained, batch_size=batch_size)
        if builder.value("slots.lock_on") and labels is None:
            raise UserError(
                "slots.lock_on=true creates slots from the first frame's mask, but none is given. Set labels=MASK, or "
                "slots=free to find segments without a mask."
            )
        return make_tracker(), MaskColours()
    if labels is not None:
        raise UserError(
            f"labels={labels}: a trained segmenter needs no masks. Leave labels out; or leave "
            f"{'head.weights' if builder.resume is None else 'resume'} out to track the objects of a mask."
        )
    has_objects = isinstance(trained.model.task, ObjectTask)
    _check_options(options, ("keep", "min_score") if has_objects else ("smoothing",))
    refuse_layers(trained.model.task, "mode=track", "mode=predict segments each frame of a video.")
    if trained.strategy.base is not trained.strategy:
        logger.warning(
            "inference.min_region and inference.largest_component have no effect in mode=track, whose masks may have "
            "small regions. mode=predict removes them from each frame of a video."
        )
    sizes = find_trained_sizes(trained, out_dir)
    if sizes is not None:
        trained.limit_size()
    make_tracker = tracker_maker(builder, trained.engine, trained, batch_size=batch_size, options=options, sizes=sizes)
    if has_objects:
        return make_tracker(), MaskColours(classes=tuple(trained.classes))
    return make_tracker(), MaskColours(palette=tuple(trained.palette), background=None)


def _check_options(options: Mapping[str, float | None], allowed: Collection[str]) -> None:
    """Refuse options that the model does not have.

    Raises:
        UserError: one of the others is set; the message names the models that have it.
    """
    for key, value in options.items():
        if value is not None and key not in allowed:
            raise UserError(f"mode.{key}={value} is for {_PURPOSES[key]}, and this is none. Leave mode.{key} out.")


@contextmanager
def _unfinished_run(folder: Path, restart: str | None) -> Iterator[TrackState | None]:
    """Lock the folder of an unfinished run and yield its saved state; yield None for a new run."""
    if restart is None:
        yield None
        return
    check_unfinished(folder)
    with RunFolder(folder) as run:
        run.enter(folder, remedy="start over without mode.restart")
        yield read_track_state(folder)


def _go_on(tracker: Tracker, state: TrackState, folder: Path) -> TrackProgress:
    """Load the saved state of a run into a tracker and return the progress of the run.

    Raises:
        UserError: the run used another tracker, or its state is invalid.
    """
    check_same_settings(folder, state.settings, tracker.settings)
    done = state.progress.done
    try:
        if not isinstance(done, int) or done < 0 or bool(done) != bool(state.tensors):
            raise ValueError(f"{format_value(done)} frames done, {count_of(state.tensors, 'tensor')}")
        tracker.load(state.tensors)
    except UserError:
        raise
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"{folder / STATE} is not readable ({error!r}). Leave mode.restart out to start over."
        ) from error
    logger.info("Resuming in %s after %s", folder, count_of(done, "frame"))
    return state.progress
