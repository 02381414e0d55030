from functools import partial

import numpy as np
import pytest
from making import save, write_motion_jpeg
from mistakes import assert_refused
from PIL import Image

from dinoseg.extensions.tracking.video.labels import find_labels
from dinoseg.extensions.video.frames import FolderReader, open_frames
from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.utils.errors import UserError

SIZE = (12, 18)


def ids(value=1, size=SIZE, dtype=np.uint8):
    mask = np.zeros(size, dtype)
    mask[2:6, 3:9] = value
    return mask


@pytest.fixture
def folder(tmp_path):
    """Write frames whose order by name is not that by number, the third of another kind."""
    for number in (1, 2, 9, 10, 100):
        frame = np.full((*SIZE, 3), number, np.uint8)
        save(tmp_path / "in" / f"frame{number}.{'bmp' if number == 9 else 'png'}", frame)
    (tmp_path / "in/notes.txt").write_text("none")
    save(tmp_path / "in/.hidden.png", frame)
    return tmp_path / "in"


@pytest.fixture
def video(tmp_path):
    return write_motion_jpeg(tmp_path / "v.avi", np.zeros((7, *SIZE, 3), np.uint8), SIZE)


def test_a_folder_is_read_as_it_is_counted(folder):
    with open_frames(str(folder)) as frames:
        assert isinstance(frames, FolderReader)
        assert (frames.count, frames.size, frames.fps) == (5, SIZE, 25.0)
        assert [frames.frame_name(at) for at in range(5)] == ["frame1", "frame2", "frame9", "frame10", "frame100"]
        assert [int(frame[0, 0, 0]) for frame in frames] == [1, 2, 9, 10, 100]
        assert [int(frame[0, 0, 0]) for frame in frames] == [1, 2, 9, 10, 100]
        assert frames.position("frame10") == 3 and frames.position("frame3") is None


def test_a_video_knows_its_frames_by_number(video):
    with open_frames(str(video)) as frames:
        assert isinstance(frames, VideoReader) and frames.count == 7
        assert frames.frame_name(3) == "000000003" and frames.position("3") == frames.position("0003") == 3
        assert [frames.position(name) for name in ("mask", "-1", "8", "3.5", "²")] == [None] * 5


def test_a_file_is_of_the_first_frame(folder, tmp_path):
    found = find_labels(str(save(tmp_path / "first.png", ids(9))), open_frames(str(folder)))
    assert np.array_equal(found.read(0), ids(9)) and found.read(0).dtype == np.uint8 and found.read(1) is None
    assert find_labels(None, open_frames(str(folder))).read(0) is None


def test_a_folder_of_masks_goes_by_names(folder, video, tmp_path):
    for number, name in enumerate(("frame1", "frame10")):
        save(tmp_path / "masks" / f"{name}.png", ids(number + 1))
    found = find_labels(str(tmp_path / "masks"), open_frames(str(folder)))
    assert [found.read(at) is not None for at in range(5)] == [True, False, False, True, False]
    assert found.read(3).max() == 2
    for name in ("0000", "5"):
        save(tmp_path / "numbers" / f"{name}.png", ids())
    assert find_labels(str(tmp_path / "numbers"), open_frames(str(video))).files.keys() == {0, 5}


def test_kinds_of_mask_files(folder, tmp_path):
    def read(pixels, name="m.png", palette=None, **options):
        image = Image.fromarray(pixels)
        if palette:
            image.putpalette(palette)
        image.save(tmp_path / name, **options)
        return find_labels(str(tmp_path / name), open_frames(str(folder))).read(0)

    void = ids(3)
    void[0] = 255
    assert np.array_equal(read(ids(3)), ids(3))
    assert np.array_equal(read(ids(3), palette=[0, 0, 0] * 3 + [9, 200, 9] * 253), ids(3))
    assert np.array_equal(read(ids(3, dtype=np.uint16)), ids(3))
    assert np.array_equal(read(np.stack([ids(3)] * 3, axis=-1)), ids(3))
    assert np.array_equal(read(void), void)  # 255 stays void beside an object,
    assert np.array_equal(read(ids(255)), ids(1))  # and is the object where there is no other
    assert np.array_equal(read(ids() == 1), ids(1))  # one bit a pixel
    assert np.array_equal(read(ids(9), "m.tif"), ids(9))
    assert np.array_equal(read(ids(9), "m.tif", compression="tiff_lzw"), ids(9))


def test_first_nonempty_mask_decides_the_meaning_of_255(folder, tmp_path):
    corner = ids(255)
    mixed = ids(255)
    mixed[8:, 10:] = 2

    def read(*given, order=(0, 1, 2)):
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        for name, mask in zip(("frame1", "frame2", "frame10"), given, strict=True):
            save(place / f"{name}.png", mask)
        found = find_labels(str(place), open_frames(str(folder)))
        masks = {at: found.read((0, 1, 3)[at]) for at in order}
        assert all(mask.dtype == np.uint8 for mask in masks.values())
        return [masks[at] for at in (0, 1, 2)]

    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        for given in ((ids(3), corner, mixed), (ids(0), ids(3), corner), (mixed, corner, ids(0))):
            assert all(map(np.array_equal, read(*given, order=order), given))  # void throughout
        one = read(ids(0), corner, mixed, order=order)
        assert np.array_equal(one[1], ids(1)) and np.array_equal(one[2], np.where(mixed == 255, 1, mixed))
        assert not one[0].any()


@pytest.mark.parametrize(
    ("name", "pixels", "options", "message"),
    [
        ("m.png", ids(size=(12, 17)), {}, r"is 12 x 17 pixels, but the frames are 12 x 18 \(H x W\).*nearest"),
        ("m.png", ids(300, dtype=np.uint16), {}, "holds the object id 300: ids go from 1 to 254.*Renumber.*8 bits"),
        ("m.tif", ids(-4, dtype=np.int32), {}, "holds the object id -4"),
        ("m.png", np.stack([ids(128), ids(0), ids(0)], axis=-1), {}, "is a colour image.*grey or palette PNG"),
        ("m.jpg", ids(9), {"quality": 95}, r"has a lossy format \(JPEG\).*grey or palette PNG"),
        ("m.png", ids(9), {"format": "JPEG"}, r"has a lossy format \(JPEG\)"),  # what it holds counts
        ("m.webp", ids(9), {}, r"has a lossy format \(WEBP\)"),
        ("m.tif", ids(9), {"compression": "jpeg"}, r"has a lossy format \(TIFF\)"),
    ],
)
def test_unusable_masks_are_refused(folder, tmp_path, name, pixels, options, message):
    Image.fromarray(pixels).save(tmp_path / name, **options)
    with pytest.raises(UserError, match=f"{name} {message}"):
        find_labels(str(tmp_path / name), open_frames(str(folder))).read(0)


@pytest.mark.parametrize(
    ("source", "names", "message"),
    [
        ("folder", [], "holds no mask directly. Masks are image files"),
        ("folder", ["frame2", "frame100"], "no mask for the first frame, frame1; it has frame2, frame100. Add one"),
        ("folder", ["frame1", "frame3", "4"], r"2 masks without frame in .*: 4\.png, frame3\.png. Masks are named"),
        ("video", ["0", "9"], r"has 1 mask without frame in .*v\.avi: 9\.png"),
        ("video", ["0", "00"], r"00?\.png and .*00?\.png are masks of the same frame: keep one"),
    ],
)
def test_unusable_folders_are_refused(request, tmp_path, source, names, message):
    frames = open_frames(str(request.getfixturevalue(source)))
    (tmp_path / "masks").mkdir()
    for name in names:
        save(tmp_path / "masks" / f"{name}.png", ids())
    with pytest.raises(UserError, match=message):
        find_labels(str(tmp_path / "masks"), frames)


def test_unusable_files_are_refused(folder, tmp_path):
    frames = open_frames(str(folder))
    later = save(tmp_path / "frame9.png", ids())
    (tmp_path / "m.png").write_bytes(b"\x89PNG no")
    for path, *words in (
        ("nowhere", "labels=nowhere: file or folder not found. Give the mask of the first frame"),
        (later, "is named like frame 2, but the first frame is frame1. Give"),
        (tmp_path / "m.png", "Cannot read ", "m.png as an image"),
    ):
        assert_refused(lambda path=path: find_labels(str(path), frames).read(0), *words)


def test_unusable_inputs_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, *words in (
        ("nowhere", "input=nowhere: file or folder not found. Give a video ", " or a folder of its frames"),
        (folder / "frame1.png", "input=", "frame1.png is neither a video nor a folder"),
        (folder / "*.png", "file or folder not found"),
        (tmp_path / "empty", "empty holds no frame directly. Give a folder of images"),
    ):
        assert_refused(partial(open_frames, str(path)), *words)
    opened = partial(open_frames, str(folder))
    larger = save(folder / "frame11.png", np.zeros((12, 20, 3), np.uint8))
    assert_refused(opened, "frame11.png is 12 x 20 pixels, and frame1.png 12 x 18", "one size")
    larger.unlink()
    save(folder / "frame9.png", np.zeros((*SIZE, 3), np.uint8))
    assert_refused(opened, "are one frame: keep one of them")
