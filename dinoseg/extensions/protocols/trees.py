"""Two trees of label files, matched by name, with a report on files without a counterpart."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import numpy as np

from dinoseg.extensions.protocols.contract import BadFile, Cases, ScoringCase
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import visible_files
from dinoseg.utils.images import read_ids
from dinoseg.utils.wording import count_of, join_names

_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Tree:
    """Layout of label files below a folder.

    Args:
        ending: end of the file names; the rest of the path below the folder is the file's name.
        layout: description of the layout, for messages.
        depth: number of folders between the folder and a file; None for any number.
        exclude: pattern of file names to leave out.
    """

    ending: str = ".png"
    layout: str = "any tree of PNG files"
    depth: int | None = None
    exclude: str = ""

    def files(self, folder: Path, option: str, wanted: Callable[[str], bool] | None = None) -> dict[str, Path]:
        """Return the files by name, sorted by name.

        Args:
            folder: folder to search.
            option: `reference` or `prediction`, for messages.
            wanted: whether a name has a counterpart, if known: the message suggests the subfolder with most such names.

        Raises:
            UserError: the folder is missing, or has no file at that depth.
        """
        if not folder.is_dir():
            raise UserError(f"{option}={folder} is not a folder. Give the folder that holds {self.layout}.")
        every = sorted(_walk(folder))
        fitting = [
            path
            for path in every
            if path.endswith(self.ending) and not (self.exclude and fnmatch(PurePosixPath(path).name, self.exclude))
        ]
        at_depth = [path for path in fitting if self.depth is None or path.count("/") == self.depth]
        if not at_depth:
            raise UserError(self._explain_absence(folder, option, every, fitting, wanted or bool))
        return {path.removesuffix(self.ending): folder / path for path in at_depth}

    def _explain_absence(
        self, folder: Path, option: str, every: list[str], fitting: list[str], wanted: Callable[[str], bool]
    ) -> str:
        start = f"{option}={folder} does not hold {self.layout}"
        if fitting:
            hits: Counter[str] = Counter()
            for path in fitting:
                parts = path.split("/")
                above = len(parts) - 1 - (self.depth or 0)
                if above > 0:
                    hits["/".join(parts[:above])] += wanted("/".join(parts[above:]).removesuffix(self.ending))
            hint = f" Try {option}={folder / hits.most_common(1)[0][0]}." if hits else ""
            return f"{start}: {fitting[0]} is not at that depth.{hint}"
        kinds = Counter(PurePosixPath(path).suffix or "no suffix" for path in every)
        held = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common(_SHOWN)) or "no files"
        example = f", such as {every[0]}" if every else ""
        text = f"{start}: no file ends with {self.ending}. It holds {held}{example}. Give the folder that does."
        return text + pictures_hint(folder, every)


def refuse_inside(reference: Path, prediction: Path) -> None:
    """Refuse predictions below the folder of references, where they would be read as references.

    Raises:
        UserError: the predictions lie there.
    """
    if reference.resolve() in prediction.resolve().parents:
        raise UserError(
            f"prediction={prediction} lies inside reference={reference}, whose files are all references. "
            "Move the predictions out of it, or give the folder of references alone."
        )


def pictures_hint(folder: Path, files: Iterable[str]) -> str:
    """Return a hint on what to give instead of the images of mode=eval; empty for other files."""
    if not any(file.endswith(("_pred.png", "_pred")) for file in files):
        return ""
    official = folder.parent / "official"
    if official.is_dir():
        return f" These are overlays of mode=eval: use its official/, prediction={official}."
    return (
        " Files *_pred.png are overlays of mode=eval, and the run has no official/, which needs a benchmark dataset. "
        "Otherwise use mode=predict resume=RUN input=IMAGES, which writes masks named like their images: give its run "
        "folder."
    )


def match(
    reference: Mapping[str, Path],
    prediction: Mapping[str, Path],
    *,
    folders: tuple[Path, Path],
    missing: Callable[[str], Path],
    unit: Callable[[str], str] = str,
) -> Cases:
    """Return a case for each reference with a prediction of the same name, and a problem for every other reference.

    Args:
        reference: files by name.
        prediction: files by name.
        folders: of references and of predictions, for messages.
        missing: returns the expected path of a name's prediction.
        unit: returns the unit of a name.

    Raises:
        UserError: no reference has a prediction.
    """
    cases = [
        ScoringCase(name, unit(name), ((file, prediction[name]),))
        for name, file in reference.items()
        if name in prediction
    ]
    if not cases:
        raise UserError(
            f"reference={folders[0]} holds {count_of(reference, 'file')}, but prediction={folders[1]} has no "
            f"prediction for any of them: the first would be {missing(next(iter(reference)))}, but there is "
            f"{next(iter(prediction.values()))}. Check that split and names match."
            f"{pictures_hint(folders[1], prediction)}"
        )
    problems = [
        (missing(name), f"is missing: {file} has no prediction. Add it.")
        for name, file in reference.items()
        if name not in prediction
    ]
    return Cases(cases, problems, extra(prediction.keys() - reference.keys(), folders[1]))


def extra(names: Iterable[str], folder: Path) -> list[str]:
    """Return a note for each folder with predictions that have no reference."""
    by_parent: dict[Path, list[str]] = {}
    for name in sorted(names):
        parent, _, stem = name.rpartition("/")
        by_parent.setdefault(folder / parent, []).append(stem)
    return [
        f"{count_of(stems, 'prediction')} in {parent} {'has' if len(stems) == 1 else 'have'} no reference and "
        f"{'is' if len(stems) == 1 else 'are'} not scored: {join_names(stems, _SHOWN)}"
        for parent, stems in by_parent.items()
    ]


def read_labels(path: Path) -> np.ndarray:
    """Return the ids (H, W) of a label file, of any integer type.

    Raises:
        BadFile: the file is missing, unreadable or has colour channels.
    """
    try:
        ids = read_ids(path)
    except UserError as error:
        raise BadFile(path, str(error)) from None
    if ids.ndim != 2:
        raise BadFile(path, f"has {ids.shape[2]} channels. Label files have one: write ids as a grey or palette PNG.")
    return ids


def read_both(case: ScoringCase) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a case's only reference and prediction.

    Raises:
        BadFile: one is unreadable, or their sizes differ.
    """
    return read_pair(*case.files[0])


def read_pair(
    file: Path, predicted: Path | None, read: Callable[[Path], np.ndarray] = read_labels
) -> tuple[np.ndarray, np.ndarray]:
    """Return a reference and its prediction, each (H, W), as `read` returns them.

    Raises:
        BadFile: one is unreadable, or their sizes differ.
    """
    assert predicted is not None
    reference, prediction = read(file), read(predicted)
    if reference.shape != prediction.shape:
        sizes = [f"{ids.shape[1]} x {ids.shape[0]}" for ids in (prediction, reference)]
        raise BadFile(
            predicted, f"is {sizes[0]} (width x height), its reference {sizes[1]}. Predict at the reference's size."
        )
    return reference, prediction


def read_encoded(
    references: Callable[..., np.ndarray] | None, file: Path, predicted: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids (H, W) of a reference and its prediction.

    Args:
        references: `references(file, predicted, size)` reads a reference at its prediction's size; None: it holds ids.
        file: reference.
        predicted: prediction.

    Raises:
        BadFile: one is unreadable or does not fit.
    """
    if references is None:
        return read_pair(file, predicted)
    assert predicted is not None
    prediction = read_labels(predicted)
    try:
        return references(file, predicted, (prediction.shape[0], prediction.shape[1])), prediction
    except UserError as error:
        raise BadFile(file, str(error)) from None


def refuse_ids(ids: np.ndarray, wrong: np.ndarray, path: Path, rule: str) -> None:
    """Refuse a file with invalid ids.

    Args:
        ids: (H, W).
        wrong: (H, W) bool, True where an id is invalid.
        path: the file.
        rule: the valid ids, and the remedy.

    Raises:
        BadFile: naming the first invalid ids.
    """
    if wrong.any():
        held = [str(number) for number in np.unique(ids[wrong])]
        more = f" and {len(held) - _SHOWN} others" if len(held) > _SHOWN else ""
        raise BadFile(path, f"holds the ids {', '.join(held[:_SHOWN])}{more} in {wrong.sum()} pixels. {rule}")


def _walk(folder: Path) -> Iterable[str]:
    """Yield the relative path of every visible file below a folder, with slashes."""
    for parent, files in visible_files(folder):
        start = parent.relative_to(folder)
        yield from ((start / file).as_posix() for file in files)
