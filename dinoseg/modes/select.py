"""mode=select: choice of the images or frames to label next."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from dinoseg.config.nodes import expect_type
from dinoseg.core.contracts import Head
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.video.access import VideoFrame, read_source
from dinoseg.experiment.builder import Builder, check_split
from dinoseg.experiment.trained import is_trained, load_trained
from dinoseg.experiment.unread import warn_unread
from dinoseg.models.model import SegmentationModel
from dinoseg.report.overlay import reduced, side_by_side, stacked
from dinoseg.tasks.selection.features import FeatureExtractor
from dinoseg.tasks.selection.pool import PoolImage, found_in, named_in, pool_indices
from dinoseg.tasks.selection.selector import DOUBTS, FEATURES, NOTHING, Known, Pick, Selector
from dinoseg.utils.atomic import atomic_file, write_json, write_text
from dinoseg.utils.csv_text import write_csv_table
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.ranges import Count, Positive
from dinoseg.utils.wording import count_of, one_line, reasons

logger = logging.getLogger(__name__)
_UNREAD = {  # groups and keys without effect, by what the selector needs of the images
    NOTHING: ("resolution", "backbone", "adapter", "head", "inference"),
    FEATURES: ("inference", "resolution.crop"),
    DOUBTS: (),
}


FOLDER = "images"  # in the run folder
_SHOWN = 60  # images on the contact sheet
_LINES = 20  # rows printed on the terminal
_SIDE = 320  # pixels of an image's longer side
_LONGEST = 22  # characters of a caption; longer captions show their end


def select(
    cfg: DictConfig,
    *,
    out_dir: Path,
    input: str | None,
    labels: str | None,
    count: Count | None,
    split: str = "train",
    every: Positive = 1.0,
) -> dict[str, Any]:
    """Choose the `count` most useful unlabelled images by `cfg.selection`, in order; see `write_selection`.

    Args:
        cfg: the whole config; with `resume`, its model analyses the images.
        out_dir: the run folder.
        input: see `found_in`; None: the images of a split of `cfg.data`.
        labels: see `named_in`; None: no image is labelled.
        count: number of images to choose.
        split: split of the dataset.
        every: seconds between two frames of a video.

    Raises:
        UserError: there are no images or too few, or one cannot be read.
    """
    if count is None:
        raise UserError("mode=select needs the number of images to choose: set count=N.")
    build = Builder(cfg)
    named = named_in(labels) if labels is not None else set()
    pool = _pool(build, input, split, every, named)
    _check_count(count, pool, pool_indices(named, pool), input)
    selector: Selector = expect_type(Selector, build.part("selection"), "selection")  # type: ignore[type-abstract]
    warn_unread(out_dir, _UNREAD[selector.needs], f"selection={cfg.choices.selection} supports {selector.needs} only.")
    features, uncertainty = np.zeros((len(pool), 0)), None
    if selector.needs != NOTHING:
        extractor = _build_extractor(build, uncertainty=selector.needs == DOUBTS)
        features, uncertainty, bad = extractor.extract(pool, skip=build.skips_faulty_files)
        extractor.engine.close()
        if bad:
            logger.warning("Left out, unreadable:%s", reasons({pool[at].name: bad[at] for at in bad}))
        readable = [index for index in range(len(pool)) if index not in bad]
        pool, features = [pool[at] for at in readable], features[readable]
        uncertainty = None if uncertainty is None else uncertainty[readable]
    labelled = pool_indices(named & {candidate.name for candidate in pool}, pool)
    _check_count(count, pool, labelled, input)
    known = Known([candidate.name for candidate in pool], labelled, features, uncertainty)
    picks = selector.choose(known, count, build.seed)
    write_selection(out_dir, [(pool[pick.position], pick) for pick in picks], cfg.choices.selection)
    print(f"chosen:       {len(picks)} of {count_of(pool, 'image')}, {len(labelled)} of them already labelled")
    return {"chosen": len(picks), "of": len(pool), "run": str(out_dir)}


def _pool(build: Builder, input: str | None, split: str, every: float, also: set[str]) -> list[PoolImage]:
    if input is not None:
        return found_in(input, every=every, cache_dir=build.cache_dir, also=also)
    if OmegaConf.is_missing(build.value("data"), "root"):
        raise UserError(
            "mode=select needs images to choose from: give input=<image folder, quoted pattern or video>, or data= and "
            "data.root= of a data set."
        )
    check_split(split)
    data = build.reader()(split)
    if not isinstance(data, PairDataset):
        raise UserError(f"data={build.options['data']} has no list of image files. Give its images as input=FOLDER.")
    if data.lacking:
        logger.warning(
            "%d files of split %s are not pairs of image and mask, and are left out. To choose among images without "
            "masks: input=IMAGE_FOLDER labels=MASK_FOLDER.",
            len(data.lacking),
            split,
        )
    return [PoolImage(pair.name, pair.image) for pair in data.pairs]


def _build_extractor(build: Builder, *, uncertainty: bool) -> FeatureExtractor:
    """Return the feature extractor of the trained model that a config names, or of its backbone alone.

    Raises:
        UserError: uncertainty needs a trained model, and there is none, or it has no classes.
    """
    cache_dir = build.cache_dir
    trained = load_trained(build) if is_trained(build) else None
    if uncertainty and (trained is None or trained.model.head.slots is not None):
        raise UserError(
            "selection=uncertainty needs a trained segmenter. Set resume=RUN_FOLDER, or choose selection=k_centre or "
            "typical, which need none."
        )
    if trained is None:
        engine = build.engine()
        sizes = {key: build.value(f"resolution.{key}") for key in ("scale", "longest")}
        return FeatureExtractor(
            engine.place(SegmentationModel(build.backbone(), Head(), **sizes)).eval(), engine, cache_dir
        )
    if not uncertainty:
        return FeatureExtractor(trained.model, trained.engine, cache_dir)
    inference = build.settings("inference")
    return FeatureExtractor(trained.model, trained.engine, cache_dir, predictor=trained.predictor, inference=inference)


def _check_count(count: int, pool: list[PoolImage], labelled: list[int], input: str | None) -> None:
    left = len(pool) - len(labelled)
    if count > left:
        fewer = f"Give count={left} or less, or more images" if left else "Give more images"
        frames = " (of a video, a smaller mode.every)" if input is not None else ""
        raise UserError(
            f"count={count}: {len(labelled)} of {count_of(pool, 'image')} are labelled, so {left} are left to choose "
            f"from. {fewer}{frames}."
        )


def write_selection(out_dir: Path, chosen: Sequence[tuple[PoolImage, Pick]], by: str) -> None:
    """Write the chosen images in their order, and print the first of them.

    selection.csv and selection.json list name, file, frame, time and reason of each image; selection.txt lists only
    names. contact_sheet.png shows the first 60. images/ holds copies: image files byte by byte, video frames as PNGs.

    Args:
        out_dir: the run folder.
        chosen: at least one image.
        by: name of the selector.

    Raises:
        UserError: an image cannot be read.
        OSError: a file cannot be written.
    """
    rows = [_row(order, *each) for order, each in enumerate(chosen, start=1)]
    for candidate, _ in chosen:
        _copy(candidate, out_dir / FOLDER)
    write_png(out_dir / "contact_sheet.png", contact_sheet([_shown(*each) for each in chosen[:_SHOWN]]))
    write_json(out_dir / "selection.json", {"by": by, "chosen": rows})
    write_csv_table(out_dir / "selection.csv", list(rows[0]), rows)
    write_text(out_dir / "selection.txt", "".join(f"{candidate.name}\n" for candidate, _ in chosen))
    for row in rows[:_LINES]:
        at = "" if row["time"] is None else f" at {row['time']:g} s"
        print(f"{row['order']:4}  {one_line(row['name'])}{at}: {one_line(row['reason'])}")
    if len(rows) > _LINES:
        print(f"      and {len(rows) - _LINES} more, in selection.csv")
    first = "" if len(rows) <= _SHOWN else f" (the first {_SHOWN})"
    print(f"overview:     {out_dir / 'contact_sheet.png'}{first}")
    print(f"to label:     {out_dir / FOLDER}; listed in selection.csv, selection.json and selection.txt")


def _row(order: int, candidate: PoolImage, pick: Pick) -> dict[str, Any]:
    source = candidate.source
    path, frame = (source.path, source.index) if isinstance(source, VideoFrame) else (source, None)
    time = None if candidate.time is None else round(candidate.time, 3)
    names = {"order": order, "name": candidate.name, "file": str(path), "frame": frame, "time": time}
    return {**names, "reason": pick.reason}


def _copy(candidate: PoolImage, folder: Path) -> None:
    source = candidate.source
    if isinstance(source, VideoFrame):
        write_png(folder / f"{candidate.name}.png", source.read())
    else:
        with atomic_file(folder / f"{candidate.name}{source.suffix}") as part:
            shutil.copyfile(source, part)


def _shown(candidate: PoolImage, pick: Pick) -> tuple[str, np.ndarray]:
    at = "" if candidate.time is None else f", {candidate.time:.1f} s"
    return f"{candidate.name}{at}", read_source(candidate.source)


def contact_sheet(pictures: Sequence[tuple[str, np.ndarray]], *, columns: int = 5) -> np.ndarray:
    """Lay out pairs of caption and image (H, W, 3), of any size, in rows from left to right."""
    small = [(_short(caption), reduced(picture, _SIDE)) for caption, picture in pictures]
    height, width = (max(picture.shape[axis] for _, picture in small) for axis in (0, 1))
    cells = [(caption, _centred(picture, height, width)) for caption, picture in small]
    cells += [("", np.full((height, width, 3), 255, np.uint8))] * (-len(cells) % min(columns, len(cells)))
    return stacked([side_by_side(cells[first : first + columns]) for first in range(0, len(cells), columns)])


def _short(caption: str) -> str:
    return caption if len(caption) <= _LONGEST else f"…{caption[1 - _LONGEST :]}"


def _centred(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    down, right = height - picture.shape[0], width - picture.shape[1]
    edges = ((down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))
    return np.pad(picture, edges, constant_values=255)
