import json

import numpy as np
import pytest
from command_line import SMALL, TINY, call, succeed, write_data
from making import save, write_video
from PIL import Image

import dinoseg

EXAMPLE = ("mode=example", "engine=cpu")
RGB = (*EXAMPLE, "backbone=rgb")
RULES = pytest.mark.parametrize("rule", ["discriminant", "insid3"])
RED, BLUE, GREEN = (240, 10, 0), (0, 10, 240), (10, 200, 10)
REFERENCE = "references=[[reference.png,mask.png]]"


def drawn(size, **squares):
    """Return an image with a red and a blue square, each at a (row, column), and its mask: 0, 1 and 2."""
    image = np.full((*size, 3), GREEN, np.uint8)
    mask = np.zeros(size, np.uint8)
    for number, (name, colour) in enumerate({"red": RED, "blue": BLUE}.items(), 1):
        if name in squares:
            row, column = squares[name]
            image[row : row + 16, column : column + 16] = colour
            mask[row : row + 16, column : column + 16] = number
    return image, mask


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """Return a folder with a reference, its masks, images and a video."""
    folder = tmp_path_factory.mktemp("example")
    image, mask = drawn((48, 64), red=(8, 8), blue=(24, 40))
    save(folder / "reference.png", image)
    save(folder / "both.png", mask)
    save(folder / "mask.png", 255 * (mask == 1))
    save(folder / "images/a.png", drawn((40, 56), red=(16, 24), blue=(0, 0))[0])
    save(folder / "images/none.png", drawn((32, 32))[0])
    write_video(folder / "video.avi", 3, (48, 32), draw=lambda at: drawn((32, 48), red=(8, 8 * at))[0][..., ::-1])
    return folder


def segment(where, *words, out):
    done = succeed(where, *words, f"hydra.run.dir={out}")
    return where / out, done.out


def read(path):
    return np.asarray(Image.open(path))


def is_near(found, expected):
    """Return whether masks differ at the corners of squares at most."""
    return (found != expected).sum() <= 24 * len(np.unique(expected))


@RULES
def test_an_example_segments_its_concept(where, rule):
    out, told = segment(where, *RGB, REFERENCE, f"mode.rule={rule}", "input=images", "mode.save=true", out=rule)
    expected = drawn((40, 56), red=(16, 24))[1]
    found = read(out / "masks/a.png")
    assert found.max() == 1 and is_near(found, expected) and not read(out / "masks/none.png").any()
    assert json.loads((out / "masks/classes.json").read_text())["classes"] == ["background", "object"]
    assert (out / "areas.csv").read_text().splitlines() == [
        "image,pixels,object",
        f"a,{40 * 56},{found.sum()}",
        f"none,{32 * 32},0",
    ]
    assert "empty masks:  1 mask without a match: none" in told
    scores = np.load(out / "scores/a.npy")
    assert scores.shape == (1, 5, 7) and scores.dtype == np.float16
    assert np.array_equal(scores[0] > 0.2, expected[4::8, 4::8] > 0)
    assert (out / "a_segmentation/comparison.png").is_file()


@RULES
def test_several_classes_share_the_pixels(where, rule):
    words = ("data=folder", "data.classes=[ground,red,blue]", "data.background=ground", f"mode.rule={rule}")
    out, _ = segment(where, *RGB, *words, "references=[[reference.png,both.png]]", "input=images", out=f"two_{rule}")
    expected = drawn((40, 56), red=(16, 24), blue=(0, 0))[1]
    assert is_near(read(out / "masks/a.png"), expected) and {*np.unique(read(out / "masks/a.png"))} == {0, 1, 2}
    save(where / "truth/a.png", expected)
    scored = succeed(where, "mode=score", *words[:-1], f"prediction={out}/masks", "reference=truth")
    assert "IoU %" in scored.out
    for name, array in zip(("blue_alone", "blue"), drawn((48, 64), blue=(24, 40)), strict=True):
        save(where / f"{name}.png", array)
    done = succeed(
        where, *RGB, *words, "references=[[blue_alone.png,blue.png]]", "input=images/a.png", "hydra.run.dir=b"
    )
    assert "No reference shows red" in done.err and {*np.unique(read(where / "b/masks/a.png"))} == {0, 2}


def test_a_video_is_segmented_frame_by_frame(where):
    out, told = segment(where, *RGB, REFERENCE, "input=video.avi", out="video")
    assert (out / "video_overlay.mp4").is_file() and "3 frames" in told
    for number in range(3):
        found = read(out / f"video_masks/{number:09d}.png")
        assert np.mean(found != drawn((32, 48), red=(8, 8 * number))[1]) < 0.05  # the codec blurs
        assert f"video/{number:09d},{32 * 48},{found.sum()}" in (out / "areas.csv").read_text().splitlines()


def test_a_typed_size_is_that_of_all_images(where):
    out, _ = segment(where, *RGB, REFERENCE, "input=images", "mode.size=[64,32]", "mode.save=true", out="sized")
    assert {np.load(path).shape for path in (out / "scores").glob("*.npy")} == {(1, 8, 4)}
    assert read(out / "masks/a.png").shape == (40, 56)


def test_a_trained_backbone_is_used(where):
    write_data(where / "data")
    succeed(where, "mode=train", *SMALL, "data.background=dark", "hydra.run.dir=run")
    save(where / "trained.png", drawn((48, 64), red=(8, 8))[1])
    patches = ("mode.save=true", "mode.rule=insid3", "mode.rank=null")  # whose scores do not saturate
    words = (*EXAMPLE, "resume=run", "references=[[reference.png,trained.png]]", *patches)
    out, _ = segment(where, *words, "input=images", out="after")
    assert json.loads((out / "masks/classes.json").read_text())["classes"] == ["dark", "bright"]
    bare, _ = segment(where, *EXAMPLE, *TINY, REFERENCE, "input=images", *patches, out="before")
    assert (bare / "scores/a.npy").read_bytes() != (out / "scores/a.npy").read_bytes()


def test_any_image_gives_a_mask(where):
    save(where / "odd/dot.png", np.full((1, 1, 3), 7))
    save(where / "odd/alpha.png", np.full((9, 9, 4), 200))
    save(where / "odd/long.png", np.full((3, 70, 3), 200))
    (where / "odd/reference.png").write_bytes((where / "reference.png").read_bytes())
    for size in ("null", "[32,32]"):
        out, _ = segment(where, *EXAMPLE, *TINY, REFERENCE, "input=odd", f"mode.size={size}", out=f"odd{size[1:3]}")
        shapes = {path.stem: read(path).shape for path in (out / "masks").glob("*.png")}
        assert shapes == {"dot": (1, 1), "alpha": (9, 9), "long": (3, 70), "reference": (48, 64)}
    save(where / "dot_mask.png", np.full((1, 1), 255))
    segment(where, *EXAMPLE, *TINY, "references=[[odd/dot.png,dot_mask.png]]", "input=odd", out="by_a_dot")


def test_an_unreadable_input_is_left_out_and_named(where):
    save(where / "some/a.png", drawn((32, 32))[0])
    (where / "some/bad.png").write_bytes(b"no image")
    (where / "some/bad.mp4").write_bytes(b"no video")
    done = call(where, *RGB, REFERENCE, "input=some", "hydra.run.dir=some_out")
    assert done.status == 1 and "2 of 3 inputs failed" in done.err
    assert "bad.png" in done.err and "bad.mp4" in done.err and (where / "some_out/masks/a.png").is_file()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((REFERENCE, "input=null"), ["mode=example needs images", "input="]),
        ((), ["references=null", "[[IMAGE,MASK]]"]),
        (("references=[reference.png,mask.png]",), ["references=", "pairs"]),
        (("references=[[reference.png]]",), ["references=", "pairs"]),
        (("references=[[reference.png,no.png]]",), ["no.png"]),
        (("references=[[no.png,mask.png]]",), ["no.png"]),
        (("references=[[reference.png,images/a.png]]",), ["images/a.png", "colour image"]),
        (("references=[[images/a.png,mask.png]]",), ["mask.png", "64 x 48", "56 x 40"]),
        (("references=[[reference.png,empty.png]]",), ["empty.png shows nothing", "object"]),
        ((REFERENCE, "mode.rank=24"), ["mode.rank=24", "24 channels"]),
        ((REFERENCE, "mode.size=[20,32]"), ["mode.size=[20, 32]", "patch size 8"]),
        ((REFERENCE, "mode.rule=nearest"), ["mode.rule=nearest", "discriminant", "insid3"]),
        ((REFERENCE, "task=multilabel", "data.classes=[a,b]"), ["mode=example", "task=multilabel"]),
    ],
)
def test_options_that_do_not_fit_are_refused(where, words, parts):
    save(where / "empty.png", np.zeros((48, 64)))
    done = call(where, *EXAMPLE, *TINY, "input=images", *words)
    assert done.status == 1 and all(part in done.err for part in parts), done.err


def test_python_segments_as_the_command(where):
    model = dinoseg.create_model("rgb", classes=["a", "b"])
    image, mask = read(where / "reference.png"), read(where / "mask.png")
    given = [(image, mask > 0), (where / "reference.png", where / "mask.png")]
    expected, _ = segment(where, *RGB, REFERENCE, "input=images", out="command")
    for pair in given:
        found = dinoseg.segment_by_example([pair], where / "images", backbone=model)
        for name, each in zip(("a", "none"), found, strict=True):
            assert each.dtype == np.uint8 and np.array_equal(each, read(expected / f"masks/{name}.png"))
    for bad, part in [
        ((image, mask[1:]), "size of its image"),
        ((image, 0 * mask), "shows nothing"),
        ((image,), "pairs"),
    ]:
        with pytest.raises(dinoseg.UserError, match=part):
            dinoseg.segment_by_example([bad], image, backbone=model)
