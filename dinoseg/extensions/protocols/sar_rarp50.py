"""Official SAR-RARP50 segmentation scores (EndoVis challenge 2022): mIoU, mNSD and their combination."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.extensions.protocols.contract import BadFile, Cases, DatasetProtocol, Measured, ScoringCase
from dinoseg.extensions.protocols.trees import pictures_hint, refuse_inside
from dinoseg.metrics.surface import surface_dices
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries
from dinoseg.utils.images import read_ids
from dinoseg.utils.ranges import NotNegative, check_annotations
from dinoseg.utils.wording import join_names

CLASSES = (  # ids 1 to 9; 0, the background, is not scored
    "Tool Clasper",
    "Tool Wrist",
    "Tool Shaft",
    "Suturing Needle",
    "Thread",
    "Suction Tool",
    "Needle Holder",
    "Clamps",
    "Catheter",
)
NUM_IDS = len(CLASSES) + 1
MASK_FOLDER = "segmentation"
OFFICIAL_TOLERANCE = 10.0


class VideoFrames(DatasetProtocol):
    """Base class for frames `<video>/segmentation/<stem>.png` on both sides, where predictions may be missing."""

    unit = "video"
    group = "^(video_[^_/]+)"  # an operation, as in data=sarrarp

    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return a case for each reference frame."""
        return find_frames(reference, prediction)

    def target(self, name: str) -> str:
        """Return `video_41/segmentation/000000060.png` for `video_41/000000060`.

        Raises:
            UserError: the name has no video.
        """
        video, _, stem = name.rpartition("/")
        if not video or not stem:
            raise UserError(f"{name} is not a frame name of SAR-RARP50: names are <video>/<stem>.")
        return f"{video}/{MASK_FOLDER}/{stem}.png"

    def case(self, name: str, reference: Path, prediction: Path) -> ScoringCase:
        """Return the case of a frame from its mask files; the prediction may be missing."""
        return ScoringCase(name, name.rpartition("/")[0], ((reference, prediction if prediction.is_file() else None),))


class SarRarp50(VideoFrames):
    """Scores as in `rarptk evaluate`: per frame, then averaged over classes, a video's frames, and videos.

    Args:
        tolerance: distance within which two boundaries agree, in pixels, inclusive; official: 10.

    Raises:
        UserError: the tolerance is not a valid distance.
    """

    name = "sar_rarp50"
    keys = ("mIoU", "mNSD", "score")

    @check_annotations
    def __init__(self, tolerance: NotNegative = OFFICIAL_TOLERANCE) -> None:
        self.tolerance = tolerance
        self.rules: dict[str, Any] = {
            "absent_class": "absent from reference and prediction of a frame: 1; from one of them: 0",
            "missing_prediction": "a reference frame without prediction file scores 0 for all classes in both",
            "resolution": "as stored; another size than the reference's is an error",
            "ignore": "nothing is ignored; the background (0) is not scored",
            "aggregation": "per frame, mean over the 9 classes, over a video's frames, over videos; "
            "score = sqrt(mIoU * mNSD) of the final two",
            "tolerance": f"{tolerance:g} pixels, Euclidean, inclusive"
            + ("" if tolerance == OFFICIAL_TOLERANCE else f" (not official, which is {OFFICIAL_TOLERANCE:g})"),
            "version": "surgical-vision/SAR_RARP50-evaluation with monai 0.9.1, segmentation part",
            "differs": [
                "palette files are read as indices; the official reader expands their colours and reads wrong ids",
                "coloured files are refused; the official reader takes their blue channel for ids",
                "an unreadable prediction is an error; the official script counts it as missing",
                "ids above 9 are an error that names the file; the official script crashes",
                "the official script stops if the numbers of files differ, and crashes on pandas 3 before it writes "
                "its tables; here differing numbers are a note, and pandas is not used",
                "float64 throughout; the official IoU is float32",
            ],
        }

    def measure(self, case: ScoringCase) -> Measured:
        """Return 1, then the IoU and the NSD of classes 1 to 9: (19,) float64."""
        reference, prediction = read_frame(case)
        values = np.zeros(2 * len(CLASSES))
        if prediction is not None:
            both, either = class_counts(reference, prediction)
            values[: len(CLASSES)] = np.divide(both, either, out=np.ones(len(CLASSES)), where=either > 0)
            values[len(CLASSES) :] = surface_dices(reference, prediction, range(1, NUM_IDS), self.tolerance)
        return Measured(np.concatenate(([1.0], values)), frame_details(case))

    def join(self, measured: Sequence[Measured]) -> np.ndarray:
        """Return 1 and a video's means over its frames, so that all videos have equal weight."""
        total = super().join(measured)
        return total / total[0]

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return the scores (...) from sums (..., 19) over videos."""
        iou, nsd = _class_means(sums)
        miou, mnsd = iou.mean(axis=-1), nsd.mean(axis=-1)
        return {"mIoU": miou, "mNSD": mnsd, "score": np.sqrt(miou * mnsd)}

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return `iou` and `nsd` of each class, as means over a video's frames and over videos."""
        rows = zip(CLASSES, *_class_means(sums), strict=True)
        return [
            {"id": label, "name": name, "iou": float(iou), "nsd": float(nsd)}
            for label, (name, iou, nsd) in enumerate(rows, start=1)
        ]


def find_frames(reference: Path, prediction: Path) -> Cases:
    """Return a case for each reference frame, in the layout `<video>/segmentation/<stem>.png` on both sides.

    Raises:
        UserError: a folder is missing, or the reference holds no frame.
    """
    for role, folder in (("reference", reference), ("prediction", prediction)):
        if not folder.is_dir():
            raise UserError(f"{role}={folder} is not a folder. Give the folder that holds <video>/{MASK_FOLDER}/.")
    refuse_inside(reference, prediction)
    videos = _folders_in(reference)
    masks = {video: _masks_in(reference / video / MASK_FOLDER) for video in videos}
    if not any(masks.values()):
        raise UserError(
            f"reference={reference} holds no <video>/{MASK_FOLDER}/<stem>.png. Give the folder that holds the videos, "
            f"such as test/ of the data set{f'; it holds {join_names(videos)}' if videos else ''}."
        )
    listing = Cases([])
    labelled = [video for video in videos if masks[video]]
    if not any((prediction / video / MASK_FOLDER).is_dir() for video in labelled):
        held = _folders_in(prediction)
        there = f"; it holds {join_names(held)}" if held else ""
        raise UserError(
            f"prediction={prediction} holds no folder {MASK_FOLDER}/ for the videos in reference={reference}, "
            f"{join_names(labelled)}{there}. Check that split and names match."
            + pictures_hint(prediction, (path.name for path in prediction.rglob("*_pred.png")))
        )
    for video in videos:
        if not masks[video]:
            listing.problems.append(
                (reference / video, f"holds no {MASK_FOLDER}/<stem>.png: add its masks or remove it")
            )
        elif not (prediction / video / MASK_FOLDER).is_dir():
            listing.problems.append(
                (
                    prediction / video / MASK_FOLDER,
                    f"folder missing, for {len(masks[video])} reference frames: put the predictions there, or leave it "
                    "empty to score the video as 0",
                )
            )
        else:
            _add_video(listing, video, masks[video], prediction / video / MASK_FOLDER)
    if extra := [name for name in _folders_in(prediction) if name not in masks]:
        listing.notes.append(f"{prediction}: folders without reference are not scored: {join_names(extra)}")
    return listing


def frame_details(case: ScoringCase) -> dict[str, Any]:
    """Return the details that a video's row sums: frames, and frames without prediction."""
    return {"frames": 1, "missing": int(case.files[0][1] is None)}


def read_frame(case: ScoringCase) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the ids (H, W) uint8 of reference and prediction; None for a missing prediction.

    Raises:
        BadFile: a file is unreadable, coloured, of another size, or holds ids above 9.
    """
    paths = case.files[0]
    reference = _read_mask(paths[0])
    if paths[1] is None:
        return reference, None
    prediction = _read_mask(paths[1])
    if prediction.shape != reference.shape:
        height, width = reference.shape
        raise BadFile(
            paths[1],
            f"is {prediction.shape[1]} x {prediction.shape[0]} pixels, its reference {width} x {height}: "
            "resize it by nearest neighbour to the reference's size",
        )
    return reference, prediction


def class_counts(reference: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return intersection and union in pixels, (9,) int64 each, of classes 1 to 9."""
    joint = np.bincount((reference * np.uint8(NUM_IDS) + prediction).reshape(-1), minlength=NUM_IDS**2)
    matrix = joint.reshape(NUM_IDS, NUM_IDS)
    both = matrix.diagonal()
    return both[1:], (matrix.sum(axis=0) + matrix.sum(axis=1) - both)[1:]


def _class_means(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return IoU and NSD (..., 9) from sums (..., 19) over videos."""
    means = sums[..., 1:] / sums[..., :1]
    return means[..., : len(CLASSES)], means[..., len(CLASSES) :]


def _read_mask(path: Path) -> np.ndarray:
    try:
        ids = read_ids(path)
    except UserError as error:
        raise BadFile(path, str(error)) from None
    if ids.ndim == 3:
        if (ids != ids[..., :1]).any():
            raise BadFile(path, f"holds colours, not class ids: save it as grey with ids 0 to {len(CLASSES)}")
        ids = ids[..., 0]
    if outside := np.unique(ids[(ids < 0) | (ids > len(CLASSES))]).tolist():
        shown = join_names([str(number) for number in outside])
        raise BadFile(path, f"holds ids that are not classes, {shown}: the ids are 0 to {len(CLASSES)}")
    return ids.astype(np.uint8)


def _folders_in(folder: Path) -> list[str]:
    return [path.name for path in entries(folder) if path.is_dir()]


def _masks_in(folder: Path) -> dict[str, Path]:
    """Return a folder's visible PNG files by name, without folders; empty if the folder is missing."""
    return {path.name: path for path in entries(folder) if path.suffix == ".png" and not path.is_dir()}


def _add_video(listing: Cases, video: str, masks: dict[str, Path], folder: Path) -> None:
    """Add a video's cases, and a note on files that only one side has."""
    predicted = {path.name for path in entries(folder) if path.is_file()}
    for file, mask in masks.items():
        prediction = folder / file if file in predicted else None
        listing.cases.append(ScoringCase(f"{video}/{mask.stem}", video, ((mask, prediction),)))
    remarks = []
    if len(predicted) != len(masks):
        remarks.append(f"{len(predicted)} files for {len(masks)} reference frames, which the official script refuses")
    if missing := [file for file in masks if file not in predicted]:
        remarks.append(f"missing predictions (see the rules for their score), {len(missing)}: {join_names(missing)}")
    extra = sorted(predicted - masks.keys())
    if ended := [file for file in extra if Path(file).with_suffix(".png").name in missing]:
        remarks.append(f"missing only because their suffix is not .png, {len(ended)}: {join_names(ended)}")
    if extra:
        remarks.append(f"files without reference, which are not scored, {len(extra)}: {join_names(extra)}")
    if remarks:
        listing.notes.append(f"{folder}: {'; '.join(remarks)}")
