"""Folder layout of DAVIS: sequences of a set, their annotations, and the predictions."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dinoseg.extensions.protocols.contract import Cases, ScoringCase
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries, is_name
from dinoseg.utils.wording import join_names

_SHOWN = 5  # names in a message
TRACKED, MASKS = "track.json", "masks"  # in a finished run of mode=track
_TRACKED_FORM = forms.object_with(input=forms.text)


@dataclass(frozen=True)
class DavisLayout:
    """Layout of a task's sequences below the root of the data set.

    Args:
        annotations: folder of the masks.
        years: folders below ImageSets that may hold the list of sequences; the first match counts.
        split: name of that list.
        resolution: folder below the annotations.
        skip_ends: whether the first and last frame of a sequence are not scored and need no prediction.

    Raises:
        UserError: split or resolution is not a valid name.
    """

    annotations: str
    years: tuple[str, ...]
    split: str
    resolution: str
    skip_ends: bool

    def __post_init__(self) -> None:
        for option, value, example in (("split", self.split, "val"), ("resolution", self.resolution, "480p")):
            if not isinstance(value, str) or not is_name(value):
                raise UserError(f"{option}={value} is not a valid name. Give a name such as {example}.")

    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return a case for each sequence of the set, with all its annotated frames in order.

        The masks of one video are scored with the sequence of its name, or with a folder of masks. The name is that of
        the folder, or of the video that mode=track has tracked.

        Raises:
            UserError: the root is not that of DAVIS or lacks the set or the resolution, or there is no prediction.
        """
        if _is_video(prediction):
            return self._find_video(reference, prediction, tracked_sequence(prediction) or prediction.resolve().name)
        names = self._sequences(reference)
        masks = self._masks_folder(reference)
        predicted = set(_folders(prediction, "prediction", "<sequence>/<frame>.png"))
        if predicted.isdisjoint(names):
            raise UserError(
                f"prediction={prediction} holds no folder of a sequence in {self.split}. Give the folder that holds "
                f"{names[0]}/ and so on, or the right split."
            )
        listing = Cases([])
        for name in names:
            self._add(listing, name, masks / name, prediction / name)
        if extra := sorted(predicted - set(names)):
            listing.notes.append(f"{prediction}: not in {self.split}, and not scored: {_list_names(extra)}")
        return listing

    def _find_video(self, reference: Path, prediction: Path, name: str) -> Cases:
        """Return the case of one video: a sequence of the set, or a folder of masks, whose name is then the case's."""
        listing = Cases([])
        if not (reference / "ImageSets").is_dir():
            if not _pngs(reference):
                raise UserError(
                    f"reference={reference} holds no masks. Give a folder of PNG masks named as the frames."
                )
            self._add(listing, reference.resolve().name, reference, prediction)
            return listing
        masks = self._masks_folder(reference) / name
        if not masks.is_dir():
            raise UserError(
                f"prediction={prediction} holds the masks of one video, {name}, which is not a sequence in "
                f"{masks.parent}. Give reference=FOLDER, with masks named as its frames, or masks of a sequence of "
                "DAVIS."
            )
        listing.notes.append(f"{prediction}: masks of one sequence, {name}; others of {self.split} are not scored")
        self._add(listing, name, masks, prediction)
        return listing

    def _add(self, listing: Cases, name: str, masks: Path, prediction: Path) -> None:
        frames = _pngs(masks)
        if not frames:
            listing.problems.append((masks, f"holds no annotation, but {self.split} names {name}. Add its PNG files."))
            return
        if not prediction.is_dir():
            listing.problems.append((prediction, f"is missing: {name} has no predictions. Add the folder."))
            return
        predicted = _pngs(prediction)
        scored = list(frames)[1:-1] if self.skip_ends else list(frames)
        missing = [frame for frame in scored if frame not in predicted]
        listing.problems += [
            (
                prediction / frame,
                f"is missing: {frames[frame]} has no prediction, so its sequence is not scored. Add it.",
            )
            for frame in missing
        ]
        if extra := sorted(predicted.keys() - frames.keys()):
            listing.notes.append(f"{prediction}: frames without annotation are not scored: {_list_names(extra)}")
        if not scored:
            listing.notes.append(f"{masks}: it has no frames besides the first and the last, so it adds no object")
        if not missing:
            files = tuple((path, predicted.get(frame)) for frame, path in frames.items())
            listing.cases.append(ScoringCase(name, name, files))

    def _sequences(self, root: Path) -> list[str]:
        """Return the sequences in the list: one per line, or one line per frame as in the original DAVIS-2016."""
        file = self._set_file(root)
        content = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
        lines = [line.strip() for line in content.splitlines() if line.strip()]
        names = list(dict.fromkeys(_sequence(line) for line in lines))
        if not names:
            raise UserError(f"{file} is empty. It should name one sequence a line.")
        if outside := [name for name in names if not is_name(name)]:
            raise UserError(f"{file} holds {outside[0]!r}, which names no sequence. Correct the line.")
        return names

    def _set_file(self, root: Path) -> Path:
        wanted = f"ImageSets/{self.years[0]}/{self.split}.txt"
        sets = root / "ImageSets"
        if not sets.is_dir():
            above = next((parent for parent in root.parents if (parent / "ImageSets").is_dir()), None)
            hint = f" Try reference={above}." if above else ""
            raise UserError(
                f"reference={root} is not the root of DAVIS: it holds no {wanted}. Give the folder that holds "
                f"ImageSets and {self.annotations}.{hint}"
            )
        for year in self.years:
            if (file := sets / year / f"{self.split}.txt").is_file():
                return file
            if (sets / year).is_dir():
                others = [path.stem for path in sorted((sets / year).glob("*.txt"))]
                raise UserError(
                    f"split={self.split}: {sets / year} does not hold this list; it holds {_list_names(others)}."
                )
        held = [path.name for path in sorted(sets.iterdir()) if path.is_dir()]
        hint = " Score it with davis2016." if "2016" in held else ""
        raise UserError(
            f"reference={root} holds no {wanted}; ImageSets holds {_list_names(held)}.{hint} Or add the list."
        )

    def _masks_folder(self, root: Path) -> Path:
        folder = root / self.annotations / self.resolution
        if folder.is_dir():
            return folder
        if not folder.parent.is_dir():
            raise UserError(
                f"reference={root} holds no {self.annotations}. Unpack the archive of the annotations there."
            )
        others = [path.name for path in sorted(folder.parent.iterdir()) if path.is_dir()]
        raise UserError(
            f"resolution={self.resolution}: {folder.parent} does not hold this folder; it holds {_list_names(others)}."
        )


def tracked_sequence(folder: Path) -> str | None:
    """Return the name of the video whose masks a folder of a mode=track run holds; None for any other folder."""
    if not folder.is_dir():  # a loop of links cannot be resolved
        return None
    # the folder in the run may be a link, or a link may lead to it
    places = [place for place in (folder.absolute(), folder.resolve()) if place.name == MASKS and place.is_dir()]
    record = next((path for path in (place.parent / TRACKED for place in places) if path.is_file()), None)
    if record is None:
        return None
    try:
        source = PurePosixPath(forms.read_json(record, _TRACKED_FORM)["input"])
    except forms.SchemaError as error:
        raise UserError(f"{record} is damaged ({error}). Track again, or give a folder of predictions.") from error
    return source.stem if source.suffix else source.name


def _is_video(folder: Path) -> bool:
    """Return whether a folder holds PNG files and no folders of sequences."""
    return folder.is_dir() and bool(_pngs(folder)) and not any(path.is_dir() for path in entries(folder))


def _sequence(line: str) -> str:
    path = PurePosixPath(line.split()[-1])
    return path.parent.name if len(path.parts) > 1 and path.suffix and ".." not in path.parts else line


def _pngs(folder: Path) -> dict[str, Path]:
    """Return the PNG files of a folder by name, sorted by name, without hidden files."""
    return {path.name: path for path in entries(folder) if path.suffix == ".png"}


def _folders(folder: Path, option: str, layout: str) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{option}={folder} is not a folder. Give the one that holds {layout}.")
    return [path.name for path in entries(folder) if path.is_dir()]


def _list_names(names: Iterable[str]) -> str:
    return join_names(list(names), _SHOWN) or "nothing"
