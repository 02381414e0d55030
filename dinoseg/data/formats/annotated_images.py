"""Image lookup for annotation files: files below a folder, and frames of videos."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dinoseg.data.annotation.entry import AnnotatedVideo, Entry, size_of
from dinoseg.data.formats.annotation_files import AnnotationLayout, Kind
from dinoseg.data.video.access import ImageSource, VideoFrame
from dinoseg.data.video.index import index_videos
from dinoseg.data.video.length import VIDEO_SUFFIXES
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries as files_in
from dinoseg.utils.images import IMAGE_SUFFIXES, read_size
from dinoseg.utils.natural_order import natural_order
from dinoseg.utils.wording import count_of, shown


class NotThere(ValueError):
    """Error that an image does not exist at its expected place."""


@dataclass
class Images:
    """Locates the images of annotation entries.

    Args:
        kind: kind of the annotation files.
        root: folder that the layout's paths are relative to.
        layout: locations of the files.
        cache_dir: folder of the videos' frame indexes.
    """

    kind: Kind
    root: Path
    layout: AnnotationLayout
    cache_dir: Path
    _clips: dict[tuple[Path, AnnotatedVideo], "Path | Sequence[Path]"] = field(default_factory=dict)

    def folder(self, path: Path, split: str, entries: Sequence[Entry]) -> Path:
        """Return the folder that image names are relative to, or the only video.

        Args:
            path: the annotation file; of LabelMe, the folder of files.
            split: split of the entries.
            entries: entries of the split; the first three are used to find the folder.

        Raises:
            UserError: the layout names a folder that does not exist.
        """
        names = self.layout.names(split)
        if self.layout.images is not None:
            folders = [self.root / self.layout.images.replace("{split}", name) for name in names]
            if found := next((folder for folder in folders if folder.is_dir() or _is_video(folder)), None):
                return found
            raise UserError(
                f"data.reader.layout.images: no folder {folders[0]}. Give the folder of the images (for a video, the "
                "folder of its frames or its file)."
            )
        default = path if self.kind.per_image else path.parent
        below = [self.root / pattern.format(name) for pattern in ("images/{}", "{}", "{}/images") for name in names]
        for folder in (default, *below, default / "images", self.root / "images", self.root):
            if any(self._is_there(folder, entry) for entry in entries[:3]):
                return folder
        return default

    def of(self, entry: Entry, folder: Path) -> ImageSource:
        """Return the image of an entry; if its file is missing, fall back to one with another image suffix.

        Raises:
            UserError: the image's name leads out of the folder.
            NotThere: the image cannot be found.
        """
        for name in (entry.image, *filter(None, (entry.subset, entry.clip.source if entry.clip else ""))):
            if not _stays_below(name):
                raise UserError(
                    f"{entry.path} names the image {shown(name)}, which is outside of the image folder. Give names "
                    "relative to data.reader.layout.images."
                )
        if entry.clip is not None:
            return self._frame(entry, entry.clip, folder)
        found = _image_file(folder, entry)
        if found is None:
            raise NotThere(f"{entry.path} names the image {shown(entry.image)}, which is not in {folder}.")
        return found

    def _is_there(self, folder: Path, entry: Entry) -> bool:
        try:
            return bool(self.of(entry, folder))
        except (NotThere, UserError):
            return False

    def _frame(self, entry: Entry, clip: AnnotatedVideo, folder: Path) -> ImageSource:
        if (folder, clip) not in self._clips:
            self._clips[folder, clip] = self._clip(clip, folder)
        found = self._clips[folder, clip]
        if isinstance(found, Path):
            return VideoFrame(found, entry.frame, self.cache_dir)
        position = entry.frame if len(found) == clip.frames[-1] + 1 else clip.frames.index(entry.frame)
        if not _is_file(found[position]):
            raise NotThere(f"{entry.path} has frame {entry.frame}, but {found[position]} does not exist.")
        return found[position]

    def _clip(self, clip: AnnotatedVideo, folder: Path) -> "Path | Sequence[Path]":
        """Return a video, or image files indexed by frame number or by position in `clip.frames`."""
        if _is_video(folder):
            return self._video(folder, clip)
        for base in (folder, folder / clip.subset):
            if clip.source and _is_video(base / clip.source):
                return self._video(base / clip.source, clip)
            if _named(base, f"frame_{clip.frames[0]:06d}"):
                return [_named(base, name := f"frame_{frame:06d}") or base / f"{name}.png" for frame in clip.frames]
        pictures = [path for path in files_in(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
        last = clip.frames[-1]
        if len(pictures) not in (len(clip.frames), last + 1):
            what = f"the video {clip.source} " if clip.source else "its video "
            raise NotThere(
                f"Frames {clip.frames[0]} to {last} are not in {folder}: it has neither {what}nor images "
                f"frame_{clip.frames[0]:06d} and so on, nor {last + 1} images (it has {len(pictures)})."
            )
        if pictures != sorted(pictures, key=lambda path: natural_order(path.name)):
            raise NotThere(
                f"Frames {clip.frames[0]} to {last} are images of {folder} in ambiguous order: alphabetical order, "
                'which CVAT uses, differs from numeric order. Export the task as "CVAT for images 1.1".'
            )
        return pictures

    def _video(self, path: Path, clip: AnnotatedVideo) -> Path:
        indexes, wrong = index_videos([path], self.cache_dir)
        if path not in indexes:
            raise NotThere(wrong[path])
        if len(indexes[path]) <= clip.frames[-1]:
            raise NotThere(
                f"{path} has {count_of(range(len(indexes[path])), 'frame')}, but the annotations belong to frames "
                f"{clip.frames[0]} to {clip.frames[-1]}: it is another video."
            )
        return path


def size_of_image(entry: Entry, image: ImageSource) -> tuple[int, int]:
    """Return height and width of an entry's image, from the image file if the annotations lack them.

    Raises:
        NotThere: the image cannot be read, or is too large.
    """
    if entry.size is not None:
        return entry.size
    if isinstance(image, VideoFrame):
        raise NotThere(f"{entry.path} lacks the size of the frames of {image.path} (original_size).")
    try:
        return size_of(*read_size(image))
    except (UserError, ValueError) as error:
        raise NotThere(f"{image}: {error}") from None


def name_of(entry: Entry) -> str:
    """Return an entry's name: its image's name without image suffix, below its subset if it has one."""
    return f"{entry.subset}/{_unended(entry.image)}" if entry.subset else _unended(entry.image)


def _stays_below(image: str) -> bool:
    """Return whether a relative path stays inside its folder."""
    path = PurePosixPath(image.replace("\\", "/"))
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and "\0" not in image and ":" not in path.parts[0]


def _unended(image: str) -> str:
    path = PurePosixPath(image.replace("\\", "/"))
    return str(path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and _is_file(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long, or the folder is not readable
        return False


def _named(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}{end}" for end in _endings()) if _is_file(path)), None)


def _endings() -> Iterator[str]:
    return (case for suffix in IMAGE_SUFFIXES for case in (suffix, suffix.upper()))


def _image_file(folder: Path, entry: Entry) -> Path | None:
    """Return the file of an image's name, or one of the same stem with another image suffix."""
    image = entry.image.replace("\\", "/")
    for base in dict.fromkeys((folder, folder / entry.subset)):
        if _is_file(path := base / image):
            return path
        if other := _named(base, _unended(image)):
            return other
    return None
