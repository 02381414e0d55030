"""The frames of videos that have masks as images and masks: any object against the background."""

from collections.abc import Sequence

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.clips.videos import VOID, Video, VideoLayout, chosen
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.splits import Partition
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
    """Return the annotated frames with names `<video>/<frame>`; every object is class 1.

    Of a video in which each object is annotated once, only the first mask is taken: later ones need not
    show all objects.

    Args:
        layout: where the videos lie.
        split: `train`, `val` or `test`.
        classes: names of the background and of the objects.
        palette: a colour for each, or None for default colours.
        ignore_index: id that is ignored; void becomes this.
        partition: what decides on which side of the split a video is.

    Raises:
        UserError: other than two classes, a folder or file is missing, or there is no mask at all.
    """
    labels = Labels.of(classes, palette, ignore_index)
    if len(labels.classes) != 2:
        raise UserError(
            f"data.classes has {len(labels.classes)} names: give two, one for the background, one for objects."
        )
    videos = chosen(layout, split, partition)
    pairs = [pair for video in videos for pair in _annotated(video)]
    if not pairs:
        raise UserError(f"Split {split} has {len(videos)} videos, none with a mask: it cannot be trained or scored on.")
    objects = dict.fromkeys(range(1, VOID + 1), 1)
    if not videos[0].grey:
        objects[VOID] = ignore_index
    dataset = PairDataset(pairs, labels, Masks(ids=objects))
    dataset.split_local_names = layout.split_local_names and partition.by == "folder" and partition.fold is None
    return dataset


def no_masks(split: str) -> PairDataset:
    """Refuse: a folder of videos has no masks."""
    raise UserError(
        f"data=videos has no masks, which split {split} is asked for: it serves what needs frames "
        "alone. To train or score on labelled frames, choose another data set, such as data=folder or data=davis2017."
    )


def _annotated(video: Video) -> list[Pair]:
    positions = sorted(video.masks)
    return [
        Pair(f"{video.name}/{video.frame_name(position)}", video.frames[position], video.masks[position])
        for position in (positions if video.dense else positions[:1])
    ]
