"""Reader of DAVIS 2016 and 2017 in their original layout: JPEGImages/, Annotations/ and ImageSets/."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import ClassVar

from dinoseg.extensions.clips.videos import FrameFiles, Video, frames_and_masks, require_masks
from dinoseg.extensions.video.pictures import picture_files
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import is_name
from dinoseg.utils.ranges import Count
from dinoseg.utils.wording import count_of, join_names

FRAMES_PER_SECOND = 24
UNSUPERVISED = 2019  # year of the unsupervised task's test sets, which have no masks
YEARS = (2016, 2017, UNSUPERVISED)  # years of the image sets


@dataclass(frozen=True)
class Davis:
    """Locations of the DAVIS sequences; those of the unsupervised test sets (year 2019) may have no masks.

    Args:
        root: folder with `JPEGImages`, `Annotations` and `ImageSets`.
        year: 2016: one object, masks are grey; 2017: several, masks hold their ids.
        size: `480p`, `Full-Resolution` or, in the first release of 2016, `1080p`.
        annotations: `Annotations`, or `Annotations_unsupervised` for the objects of that task.
        sets: split to its image set, such as `{test: test-dev}`.
    """

    root: str
    year: Count = 2017
    size: str = "480p"
    annotations: str = "Annotations"
    sets: Mapping[str, str] = field(default_factory=dict)
    split_local_names: ClassVar[bool] = False

    def videos(self, split: str) -> list[Video]:
        """Return the sequences of a split.

        Raises:
            UserError: a folder, image set or sequence is missing, or frames and masks do not match.
        """
        if self.year not in YEARS:
            raise UserError(f"data.year={self.year}: DAVIS has image sets of {join_names([*map(str, YEARS)])}.")
        root = Path(self.root).expanduser()
        images, masks = root / "JPEGImages" / self.size, root / self.annotations / self.size
        for folder in (images,) if self.year == UNSUPERVISED else (images, masks):
            if not folder.is_dir():
                contents = sorted(path.name for path in folder.parent.glob("[!.]*")) or ["nothing"]
                raise UserError(
                    f"No folder {folder}; its parent folder holds {join_names(contents)}. Check data.root and "
                    "data.size, and unpack DAVIS without changing its folders."
                )
        names = _read_set(root, (str(self.year), self.size), split, self.sets.get(split, split))
        if absent := [name for name in names if not (images / name).is_dir()]:
            raise UserError(
                f"{count_of(absent, 'sequence')} of split {split} not in {images}: {join_names(absent)}. Unpack DAVIS "
                "again, or remove these names from the image set."
            )
        return [self._video(name, images / name, masks / name) for name in names]

    def _video(self, name: str, images: Path, labels: Path) -> Video:
        if self.year == UNSUPERVISED and not (labels.is_dir() and picture_files(labels)):
            files = list(picture_files(images).values())
            if not files:
                raise UserError(f"{images} holds no frame. Unpack DAVIS again.")
            return Video(name, FrameFiles(images, files), FRAMES_PER_SECOND)
        frames, masks = frames_and_masks(images, labels)
        if set(masks) != {0}:  # the test sets contain only the first mask
            require_masks(name, frames, masks)
        return Video(name, frames, FRAMES_PER_SECOND, masks, grey=self.year == 2016)


def _read_set(root: Path, folders: tuple[str, str], split: str, name: str) -> list[str]:
    """Return the sequences of an image set: names, or lines of image and mask path as in the first release."""
    candidates = [root / "ImageSets" / folder / f"{name}.txt" for folder in folders]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        image_sets = sorted(file.relative_to(root).as_posix() for file in (root / "ImageSets").glob("*/[!.]*.txt"))
        usable = sorted({file.stem for candidate in candidates for file in candidate.parent.glob("[!.]*.txt")})
        raise UserError(
            f"No image set {candidates[0]}; {root} has {join_names(image_sets) or 'none'}. {_remedy(split, usable)}"
        )
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    names = list(dict.fromkeys(_sequence(line.strip()) for line in lines if line.strip()))
    if not names:
        raise UserError(f"The image set {path} is empty: write one sequence per line.")
    if outside := [name for name in names if not is_name(name)]:
        raise UserError(f"The image set {path} holds {outside[0]!r}, which names no sequence. Correct the line.")
    return names


def _sequence(line: str) -> str:
    """Return the sequence of a line: its name, or the path of an image such as `/JPEGImages/480p/bear/00000.jpg`."""
    path = PurePosixPath(line.split()[0])
    return path.parent.name if len(path.parts) > 1 and path.suffix and ".." not in path.parts else line


def _remedy(split: str, usable: list[str]) -> str:
    """Return advice on a missing image set; `usable`: the sets of this year.

    A single set can serve as train only if a share of it is held out; otherwise the score is that of training files.
    """
    if not usable:
        return "Check data.year, and unpack DAVIS without changing its folders."
    if split not in ("train", "val"):
        return f"Set the image set of {split}, such as data.sets.{split}={usable[-1]}."
    named = "train" if "train" in usable else usable[-1]
    return (
        f"To train on one set and hold out a share of it for val, set data.sets.train={named} "
        "data.reader.partition.by=fraction."
    )
