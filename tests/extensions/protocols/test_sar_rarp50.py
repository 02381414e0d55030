import math
import pickle
from functools import partial

import numpy as np
import pytest
from making import save
from mistakes import assert_refused
from PIL import Image
from scipy import ndimage
from score_making import assert_bad_file, overlap, surface_dice, unit_sums

from dinoseg.extensions.protocols.sar_rarp50 import CLASSES, SarRarp50
from dinoseg.extensions.protocols.sar_rarp50_seed import SarRarp50Seed

PROTOCOLS = [SarRarp50, SarRarp50Seed]


def patches(seed, shape=(40, 56), labels=(0, 1, 2, 3, 5, 9)):
    """Return ids in patches; the background is larger than the others."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=(len(labels), *shape)), (0, 3, 3))
    field[0] += 0.05
    return np.array(labels, np.uint8)[field.argmax(axis=0)]


SHAPE = (40, 56)
EMPTY = np.zeros(SHAPE, np.uint8)
DOT = EMPTY.copy()
DOT[0, 0] = 4
VIDEOS = {  # video to frames of reference and prediction; None: there is no file
    "video_41": [
        (patches(0), patches(0)),
        (patches(1), patches(2)),
        (patches(3), np.roll(patches(3), 12, axis=1)),
        (patches(4), None),
        (EMPTY, EMPTY),
    ],
    "video_42": [(EMPTY, DOT), (DOT, EMPTY), (DOT, np.full(SHAPE, 4)), (np.full(SHAPE, 7), np.full(SHAPE, 7))],
    "video_43_1": [(patches(5, (33, 21)), patches(6, (33, 21), (0, 4, 6, 7, 8)))],
    "video_44": [(EMPTY, None), (patches(7), patches(8))],
}


@pytest.fixture
def folders(tmp_path):
    for video, frames in VIDEOS.items():
        (tmp_path / "predicted" / video / "segmentation").mkdir(parents=True)
        for index, masks in enumerate(frames):
            for root, ids in zip(("real", "predicted"), masks, strict=True):
                if ids is not None:
                    save(tmp_path / root / video / "segmentation" / f"{index * 60:09d}.png", ids)
    return tmp_path / "real", tmp_path / "predicted"


def case_of(folders, frame, make=SarRarp50):
    """Return the case of a frame of video_41."""
    return next(case for case in make().find(*folders).cases if case.name == f"video_41/{frame:09d}")


def official(tolerance=10.0):
    """The definition frame by frame in float64: (videos, 9) of IoU and of NSD."""
    means = []
    for frames in VIDEOS.values():
        rows = []
        for reference, prediction in frames:
            if prediction is None:
                rows.append(np.zeros((2, 9)))
                continue
            masks = [(reference == label, prediction == label) for label in range(1, 10)]
            ious = [overlap([pair])[0] for pair in masks]
            nsds = [surface_dice(*pair, tolerance) for pair in masks]
            rows.append([[1.0 if value is None else value for value in values] for values in (ious, nsds)])
        means.append(np.mean(np.array(rows, np.float64), axis=0))
    return np.array(means)


@pytest.mark.parametrize("tolerance", [10.0, 0.0])
def test_scores_equal_the_definition(folders, tolerance):
    protocol = SarRarp50(tolerance)
    videos = unit_sums(protocol, *folders)
    expected = official(tolerance)  # (videos, 2, 9)
    assert list(videos) == sorted(VIDEOS)

    scores = protocol.scores(sum(videos.values()))
    miou, mnsd = expected.mean(axis=(0, 2))
    assert list(scores) == list(protocol.keys)
    assert scores["mIoU"] == pytest.approx(miou, abs=1e-12)
    assert scores["mNSD"] == pytest.approx(mnsd, abs=1e-12)
    assert scores["score"] == pytest.approx(math.sqrt(miou * mnsd), abs=1e-12)
    products = np.sqrt(expected[:, 0].mean(axis=1) * expected[:, 1].mean(axis=1))
    assert abs(scores["score"] - products.mean()) > 1e-6  # only the finals are combined

    each = protocol.scores(np.stack(list(videos.values())))  # vectorised over videos
    np.testing.assert_allclose(each["mIoU"], expected[:, 0].mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(each["mNSD"], expected[:, 1].mean(axis=1), atol=1e-12)

    rows = protocol.per_class(sum(videos.values()))
    assert [row["id"] for row in rows] == list(range(1, 10))
    assert [row["name"] for row in rows] == list(CLASSES)
    np.testing.assert_allclose([row["iou"] for row in rows], expected[:, 0].mean(axis=0), atol=1e-12)
    np.testing.assert_allclose([row["nsd"] for row in rows], expected[:, 1].mean(axis=0), atol=1e-12)


@pytest.mark.heavy  # imports MONAI
@pytest.mark.filterwarnings("ignore")  # of the reference's own
def test_scores_equal_monai(folders):
    metrics, torch = pytest.importorskip("monai.metrics"), pytest.importorskip("torch")
    protocol = SarRarp50()
    for case in protocol.find(*folders).cases:
        video, stem = case.name.split("/")
        reference, prediction = VIDEOS[video][int(stem) // 60]
        if prediction is None:
            assert not protocol.measure(case).sums[1:].any()
            continue
        ids = [torch.from_numpy(np.asarray(each, np.int64)) for each in (prediction, reference)]
        maps = [torch.nn.functional.one_hot(each, 10).permute(2, 0, 1)[None] for each in ids]
        iou = metrics.compute_iou(*maps, include_background=False, ignore_empty=False)[0].numpy()
        nsd = metrics.compute_surface_dice(*maps, [10.0] * 9, include_background=False)[0].numpy().copy()
        held = np.array([[(each == label).any() for label in range(1, 10)] for each in (prediction, reference)])
        nsd[~held.any(axis=0)] = 1
        nsd[held[0] != held[1]] = 0
        np.testing.assert_allclose(protocol.measure(case).sums, [1, *iou, *nsd], atol=1e-7)


def test_the_mean_over_images_equals_its_definition(folders):
    protocol = SarRarp50Seed()
    videos = unit_sums(protocol, *folders)
    images = []
    classes = {label: [] for label in range(1, 10)}
    for reference, prediction in (frame for frames in VIDEOS.values() for frame in frames):
        values = []
        for label in range(1, 10):
            ours = reference == label
            theirs = (EMPTY if prediction is None else prediction) == label
            union = (ours | theirs).sum()
            values.append((ours & theirs).sum() / (union + 1e-6) if union else np.nan)
            classes[label] += [] if math.isnan(values[-1]) else [values[-1]]
        images += [] if np.isnan(values).all() else [np.nanmean(values)]
    assert len(images) == sum(map(len, VIDEOS.values())) - 2  # the two that hold background only

    scores = protocol.scores(sum(videos.values()))
    assert list(scores) == list(protocol.keys) == ["mIoU_seed_per_image"]
    assert scores["mIoU_seed_per_image"] == pytest.approx(np.mean(images), abs=1e-12)
    rows = protocol.per_class(sum(videos.values()))
    assert [row["images"] for row in rows] == [len(values) for values in classes.values()]
    for row in rows:
        assert row["name"] == CLASSES[row["id"] - 1]
        assert row["iou"] == pytest.approx(np.mean(classes[row["id"]]), abs=1e-12)
    challenge = sum(unit_sums(SarRarp50(), *folders).values())
    assert SarRarp50().scores(challenge)["mIoU"] > scores["mIoU_seed_per_image"] + 0.2


def test_background_only_images_have_no_mean_over_images(tmp_path):
    for root in ("real", "predicted"):
        save(tmp_path / root / "video_41/segmentation/000000000.png", EMPTY)
    protocol = SarRarp50Seed()
    folders = (tmp_path / "real", tmp_path / "predicted")
    sums = unit_sums(protocol, *folders)["video_41"]
    assert np.isnan(protocol.scores(sums)["mIoU_seed_per_image"])
    assert np.isnan([row["iou"] for row in protocol.per_class(sums)]).all()
    assert SarRarp50().scores(unit_sums(SarRarp50(), *folders)["video_41"])["score"] == 1


@pytest.mark.parametrize("protocol", [make() for make in PROTOCOLS], ids=lambda protocol: protocol.name)
def test_missing_files_are_counted_and_noted(folders, protocol):
    reference, prediction = folders
    save(prediction / "video_42/segmentation/000000999.png", EMPTY)
    (prediction / "video_42/segmentation/notes.txt").write_text("x")
    save(prediction / "video_99/segmentation/000000000.png", EMPTY)
    save(prediction / "._video_41.png", EMPTY)
    found = protocol.find(reference, prediction)
    assert not found.problems and len(found.cases) == sum(map(len, VIDEOS.values()))
    refused = "reference frames, which the official script refuses"
    missing = "missing predictions (see the rules for their score)"
    extra = "files without reference, which are not scored, 2: 000000999.png, notes.txt"
    assert [note.removeprefix(str(prediction)) for note in found.notes] == [
        f"/video_41/segmentation: 4 files for 5 {refused}; {missing}, 1: 000000180.png",
        f"/video_42/segmentation: 6 files for 4 {refused}; {extra}",
        f"/video_44/segmentation: 1 files for 2 {refused}; {missing}, 1: 000000000.png",
        ": folders without reference are not scored: video_99",
    ]
    counts = {video: np.zeros(2, int) for video in sorted(VIDEOS)}
    for case in found.cases:
        details = protocol.measure(case).details
        counts[case.unit] += (details["missing"], details["frames"])
    assert [row.tolist() for row in counts.values()] == [[1, 5], [0, 4], [0, 1], [1, 2]]


def test_folders_named_like_masks_are_passed_over(folders):
    reference, prediction = folders
    expected = SarRarp50().find(reference, prediction)
    (reference / "video_42/segmentation/000000999.png").mkdir()
    (prediction / "video_42/segmentation/000000998.png").mkdir()
    found = SarRarp50().find(reference, prediction)
    assert found.cases == expected.cases and found.notes == expected.notes and not found.problems


def test_an_ending_that_is_not_png_is_given_as_the_reason(folders):
    place = folders[1] / "video_42/segmentation"
    (place / "000000060.png").rename(place / "000000060.PNG")
    save(place / "000000999.png", EMPTY)
    (note,) = [note for note in SarRarp50().find(*folders).notes if "video_42" in note]
    assert "missing only because their suffix is not .png, 1: 000000060.PNG" in note
    assert "missing predictions (see the rules for their score), 1: 000000060.png" in note


@pytest.mark.parametrize("make", PROTOCOLS)
def test_predictions_inside_the_references_are_refused(folders, make):
    folders[1].rename(folders[0] / "mine")
    find = partial(make().find, folders[0], folders[0] / "mine")
    assert_refused(find, "mine lies inside reference=", "Move the predictions out of it")


def test_missing_video_folders_are_problems(folders):
    reference, prediction = folders
    (prediction / "video_43_1").rename(prediction / "video_43")
    (prediction / "video_44" / "segmentation").rename(prediction / "video_44" / "masks")
    (reference / "video_50" / "rgb").mkdir(parents=True)
    found = SarRarp50().find(reference, prediction)
    assert [path.relative_to(folders[0].parent).as_posix() for path, _ in found.problems] == [
        "predicted/video_43_1/segmentation",
        "predicted/video_44/segmentation",
        "real/video_50",
    ]
    assert "for 1 reference frames: put the predictions there" in found.problems[0][1]
    assert "holds no segmentation/<stem>.png" in found.problems[2][1]
    assert {case.unit for case in found.cases} == {"video_41", "video_42"}


def test_unmatched_videos_are_reported_in_one_line(folders):
    reference, prediction = folders
    for video in sorted(VIDEOS):
        (prediction / video).rename(prediction / video.replace("video", "clip"))
    words = ("holds no folder segmentation/ for the videos in ", min(VIDEOS), "; it holds clip_")
    assert_refused(partial(SarRarp50().find, reference, prediction), *words)
    save(prediction / "clip_41/000_pred.png", EMPTY)
    words = "Check that split and names match. Files *_pred.png are overlays of mode=eval"
    assert_refused(partial(SarRarp50Seed().find, reference, prediction), words)


def test_folders_that_hold_nothing_of_the_kind(folders, tmp_path):
    reference, prediction = folders
    find = SarRarp50().find
    nowhere = tmp_path / "nowhere"
    dataset = tmp_path / "dataset"
    assert_refused(partial(find, reference, nowhere), "prediction=", "nowhere is not a folder")
    assert_refused(partial(find, nowhere, prediction), "reference=", "nowhere is not a folder")
    dataset.mkdir()
    assert_refused(partial(find, dataset, prediction), "no <video>/segmentation/<stem>.png")
    reference.rename(dataset / "test")
    assert_refused(partial(find, dataset, prediction), "such as test/ of the data set; it holds test.")


SPOILT = {
    "other size": (lambda path: save(path, np.zeros((20, 28))), "is 28 x 20 pixels, its reference 56 x 40"),
    "void": (lambda path: save(path, np.full(SHAPE, 255)), "ids that are not classes, 255: the ids are 0 to 9"),
    "many ids": (lambda path: save(path, np.arange(40 * 56).reshape(SHAPE) % 256), "10, 11, 12, 13, 14 and 241 more"),
    "16 bit": (lambda path: save(path, np.full(SHAPE, 300), np.uint16), "not classes, 300"),
    "colours": (lambda path: save(path, np.full((*SHAPE, 3), (0, 255, 255))), "holds colours, not class ids"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:60]), "truncated or not an image"),
}


@pytest.mark.parametrize(
    ("fault", "side"), [*((fault, 1) for fault in SPOILT), ("other size", 0), ("void", 0), ("truncated", 0)]
)
@pytest.mark.parametrize("make", PROTOCOLS)
def test_bad_files_are_named(folders, fault, side, make):
    spoil, message = SPOILT[fault]
    paths = [folder / "video_41/segmentation/000000120.png" for folder in folders]
    spoil(paths[side])
    bad = paths[side]
    words = [message]
    if fault == "other size":  # the prediction is named, whichever was changed
        bad = paths[1]
        words = ["resize it by nearest neighbour", *([message] if side else [])]
    assert_bad_file(partial(make().measure, case_of(folders, 120, make)), bad, *words)


def test_the_reference_of_a_missing_prediction_is_read_too(folders):
    path = folders[0] / "video_41/segmentation/000000180.png"
    path.write_bytes(b"")
    assert_bad_file(partial(SarRarp50().measure, case_of(folders, 180)), path)


def test_grey_palette_and_equal_channels_hold_the_same_ids(folders):
    path = folders[1] / "video_41/segmentation/000000060.png"
    ids = VIDEOS["video_41"][1][1]
    case = case_of(folders, 60)
    expected = SarRarp50().measure(case).sums
    palette = Image.fromarray(ids, "L").convert("P")
    palette.putdata(ids.ravel().tolist())
    palette.putpalette([value for label in range(256) for value in (label * 5 % 256, 30, 7)])
    for picture in (palette, Image.fromarray(np.stack([ids] * 3, axis=-1)), Image.fromarray(ids.astype(np.uint16))):
        picture.save(path)
        np.testing.assert_array_equal(SarRarp50().measure(case).sums, expected)


@pytest.mark.parametrize("make", PROTOCOLS)
def test_a_data_set_s_frame_gives_the_same_case(folders, make):
    protocol = pickle.loads(pickle.dumps(make()))
    assert protocol.target("video_41/000000060") == "video_41/segmentation/000000060.png"
    assert protocol.target("test/video_41/000000060") == "test/video_41/segmentation/000000060.png"
    for name in ("000000060", "/000000060", "video_41/"):
        assert_refused(partial(protocol.target, name), "is not a frame name of SAR-RARP50")
    for case in protocol.find(*folders).cases:
        path = protocol.target(case.name)
        assert protocol.case(case.name, folders[0] / path, folders[1] / path) == case
    held = protocol.file_ids(DOT.astype(np.int64))
    assert held.dtype == np.uint8 and (held == DOT).all()


def test_changed_tolerance_is_marked_as_unofficial():
    assert "not official" not in SarRarp50().rules["tolerance"]
    assert SarRarp50(3).rules["tolerance"] == "3 pixels, Euclidean, inclusive (not official, which is 10)"
    rule, finite = "a number of at least 0", "a finite number"
    for tolerance, wanted in ((-1, rule), (math.nan, rule), (math.inf, finite), (True, "a number")):
        assert_refused(partial(SarRarp50, tolerance), f"tolerance={tolerance} is ", f"Give {wanted}.")
