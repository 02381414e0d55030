"""Binary segmentation dataset of annotated video frames: any object against the background."""

from collections.abc import Sequence
from dataclasses import replace

from dinoseg.core.sources import MaskSource
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.splits import Partition
from dinoseg.extensions.annotations.drawing import Drawing
from dinoseg.extensions.clips.videos import VOID, Video, VideoLayout, select_split
from dinoseg.utils.errors import UserError


def foreground(
    layout: VideoLayout,
    split: str,
    *,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | None = None,
    ignore_index: int = 255,
    partition: Partition = Partition(),  # noqa: B008 (frozen)
) -> PairDataset:
    """Return the annotated frames, named `<video>/<frame>`; every object is class 1.

    If each object is annotated only once in a video, only the video's first mask is used: later ones may not show all
    objects.

    Args:
        layout: locations of the videos.
        split: `train`, `val` or `test`.
        classes: names of the background and of the objects.
        palette: a colour for each, or None for default colours.
        ignore_index: id that is ignored; void is mapped to it.
        partition: rule that assigns videos to splits.

    Raises:
        UserError: the number of classes is not two, a folder or file is missing, or there is no mask at all.
    """
    labels = Labels.of(classes, palette, ignore_index)
    if len(labels.classes) != 2:
        raise UserError(
            f"data.classes has {len(labels.classes)} names: give two, one for the background, one for objects."
        )
    videos = select_split(layout, split, partition)
    pairs = [pair for video in videos for pair in _annotated_pairs(video)]
    if not pairs:
        raise UserError(
            f"Split {split} has {len(videos)} videos, but no masks: it cannot be used for training or scoring."
        )
    objects = dict.fromkeys(range(1, VOID + 1), 1)
    if not videos[0].grey:
        objects[VOID] = ignore_index
    dataset = PairDataset(pairs, labels, Masks(ids=objects))
    dataset.split_local_names = layout.split_local_names and partition.by == "folder" and partition.fold is None
    return dataset


def no_masks(split: str) -> PairDataset:
    """Raise a UserError, since a folder of videos has no masks."""
    raise UserError(
        f"data=videos has no masks, but masks of split {split} are needed. To train or score on labelled frames, "
        "choose another data set, such as data=folder or data=davis2017."
    )


def _annotated_pairs(video: Video) -> list[Pair]:
    positions = sorted(video.masks)
    return [
        Pair(f"{video.name}/{video.frame_name(position)}", video.frames[position], _as_class(video.masks[position]))
        for position in (positions if video.dense else positions[:1])
    ]


def _as_class(mask: MaskSource) -> MaskSource:
    """Return a mask whose objects are class 1 if it is a drawing; the reader maps the ids of files."""
    return replace(mask, shapes=[(1, form) for _, form in mask.shapes]) if isinstance(mask, Drawing) else mask
