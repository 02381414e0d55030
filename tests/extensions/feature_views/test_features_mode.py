import json

import numpy as np
import pytest
from command_line import SMALL, TINY, call, succeed, write_data
from making import save, write_video
from PIL import Image
from safetensors import safe_open

from dinoseg.extensions.video.prediction import VideoReader

VIEW = ("mode=features", "engine=cpu")
RGB = (*VIEW, "backbone=rgb", "mode.normalise=false")
SIZES = {"b10": (24, 40), "b9": (17, 9), "a": (8, 8)}  # natural order: a, b9, b10


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """Return a folder with images of several sizes and a short video."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        save(folder / "images" / f"{name}.png", rng.integers(0, 256, (*size, 3)))
    ramps = np.stack([*np.meshgrid(np.arange(48), 5 * np.arange(32)), np.full((32, 48), 90)], 2)
    write_video(folder / "video.avi", 5, draw=lambda index: (ramps + 20 * index).clip(0, 255).astype(np.uint8))
    return folder


def show(where, *words, out):
    succeed(where, *words, f"hydra.run.dir={out}")
    return where / out


def picture(path):
    return np.asarray(Image.open(path))


def patches_of(image):
    """Return what backbone=rgb gives for an image: mean colours of 8 x 8 patches, 0 past the end."""
    levels = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    height, width = (-(-side // 8) for side in image.shape[:2])
    padded = np.zeros((8 * height, 8 * width, 3))
    padded[: image.shape[0], : image.shape[1]] = levels
    return padded.reshape(height, 8, width, 8, 3).mean((1, 3))


def test_pictures_equal_a_plain_computation_of_all_patches(where):
    out = show(where, *RGB, "input=images", "mode.save=true", "mode.components=[2,1]", out="plain")
    images = {name: picture(where / "images" / f"{name}.png") for name in SIZES}
    features = {name: patches_of(image) for name, image in images.items()}
    flat = np.concatenate([value.reshape(-1, 3) for value in features.values()])
    _, singular, rows = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    rows = [row if max(row, key=abs) > 0 else -row for row in rows]
    low, high = np.quantile((flat - flat.mean(0)) @ np.stack(rows).T, [0.01, 0.99], axis=0)
    for name, image in images.items():
        levels = (((features[name] - flat.mean(0)) @ np.stack(rows).T - low) / (high - low)).clip(0, 1)
        shown = levels.repeat(8, 0).repeat(8, 1)[: image.shape[0], : image.shape[1]] * 255
        found = picture(out / f"{name}.png")
        assert np.array_equal(found[:, : image.shape[1]], image)
        difference = found[:, image.shape[1] :].astype(float) - np.stack(
            [shown[..., 1], shown[..., 0], 0 * shown[..., 0]], 2
        )
        assert np.abs(difference).max() <= 0.51
        np.testing.assert_allclose(np.load(out / f"{name}.npy"), features[name], atol=2e-3)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["variance_shares"] == pytest.approx((singular**2 / (singular**2).sum())[[1, 0]], rel=1e-5)
    assert [*summary["inputs"]] == sorted(SIZES) and summary["inputs"]["b9"]["patches"] == 6
    facts = json.loads((out / "b9.json").read_text())
    assert facts == {"grid": [3, 2], "patch_size": 8, "resized": [17, 9], "layer": 0}


def test_an_image_alone_has_its_bytes_of_the_whole_input(where):
    out = show(where, *VIEW, *TINY, "input=images", out="whole")
    alone = show(where, *VIEW, *TINY, "input=images/b9.png", f"mode.basis={out}/basis.safetensors", out="alone")
    assert (alone / "b9.png").read_bytes() == (out / "b9.png").read_bytes()
    assert (alone / "basis.safetensors").read_bytes() == (out / "basis.safetensors").read_bytes()


def test_frames_of_a_video_are_shown_in_one_basis(where):
    out = show(where, *RGB, "input=video.avi", "mode.every=2", out="video")
    with VideoReader(where / "video.avi") as source, VideoReader(out / "video.mp4") as shown:
        frames, drawn = list(source), list(shown)
        assert shown.size == (32, 96) and shown.fps == source.fps and len(drawn) == len(frames) == 5
    with safe_open(out / "basis.safetensors", "np") as file:
        mean = file.get_tensor("mean")
    expected = np.concatenate([patches_of(frame).reshape(-1, 3) for frame in frames[::2]]).mean(0)
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    for frame, both in zip(frames, drawn, strict=True):  # the encoder blurs
        assert np.abs(both[:, :48].astype(float) - frame).mean() < 12
    save(where / "frame.png", frames[3])
    alone = show(where, *RGB, "input=frame.png", f"mode.basis={out}/basis.safetensors", out="frame")
    assert np.abs(picture(alone / "frame.png")[:, 48:].astype(float) - drawn[3][:, 48:]).mean() < 12


def test_the_first_component_or_classes_choose_what_is_drawn(where):
    out = show(where, *RGB, "input=images/b10.png", "mode.foreground=component", out="component")
    shown = picture(out / "b10.png")[::8, 40::8]
    values = patches_of(picture(where / "images/b10.png"))
    with safe_open(out / "basis.safetensors", "np") as file:
        first = (values - file.get_tensor("mean")) @ file.get_tensor("directions")[0]
    assert np.array_equal(shown.any(2), first > 0) and 0 < (first > 0).sum() < first.size
    write_data(where / "data")
    succeed(where, "mode=train", *SMALL, "data.background=dark", "hydra.run.dir=run")
    after = show(where, *VIEW, "resume=run", "input=images/b10.png", "mode.foreground=classes", out="classes")
    succeed(where, "mode=predict", "engine=cpu", "resume=run", "input=images/b10.png", "hydra.run.dir=ids")
    ids = picture(where / "ids/masks/b10.png")
    assert not picture(after / "b10.png")[:, 40:][ids == 0].any() and picture(after / "b10.png")[:, 40:][ids == 1].any()
    before = show(where, *VIEW, *TINY, "input=images/b10.png", out="before")
    assert (before / "b10.png").read_bytes() != (after / "b10.png").read_bytes()


def test_a_trained_backbone_is_compared_with_its_start(where):
    write_data(where / "data")
    succeed(where, "mode=train", *SMALL, "adapter.lr=0.05", "hydra.run.dir=tuned")
    words = (*VIEW, "input=images/b10.png", "mode.save=true")
    out = show(where, *words, "resume=tuned", "mode.before=true", out="both")
    after = np.load(show(where, *words, "resume=tuned", out="after") / "b10.npy").astype(float)
    first = np.load(show(where, *words, *TINY, out="first") / "b10.npy").astype(float)
    cosine = (first * after).sum(2)
    assert cosine.max() < 0.9999 and np.array_equal(np.load(out / "b10.npy"), after)
    panels = np.split(picture(out / "b10.png"), 4, axis=1)
    grey = np.rint(255 * cosine.clip(0, 1)).repeat(8, 0).repeat(8, 1)[..., None]
    assert np.array_equal(panels[0], picture(where / "images/b10.png")) and np.abs(panels[3] - grey).max() <= 1
    assert json.loads((out / "summary.json").read_text())["inputs"]["b10"]["cosine"] == pytest.approx(
        cosine.mean(), abs=1e-3
    )
    with safe_open(out / "basis.safetensors", "np") as file:
        mean = file.get_tensor("mean")
    np.testing.assert_allclose(mean, np.concatenate([first, after]).mean((0, 1)), atol=1e-3)
    assert len({panel.tobytes() for panel in panels}) == 4


def test_an_unreadable_input_is_left_out_and_named(where):
    for name in ("a", "b9"):
        save(where / "some" / f"{name}.png", picture(where / "images" / f"{name}.png"))
    (where / "some/bad.png").write_bytes(b"no image")
    done = call(where, *RGB, "input=some", "hydra.run.dir=some_out")
    assert done.status == 1 and "1 of 3 inputs failed" in done.err and "bad.png" in done.err
    assert {path.name for path in (where / "some_out").glob("*.png")} == {"a.png", "b9.png"}
    save(where / "few/a.png", picture(where / "images/a.png"))
    save(where / "few/b9.png", picture(where / "images/b9.png"))
    few = show(where, *RGB, "input=few", out="few_out")
    assert (few / "b9.png").read_bytes() == (where / "some_out/b9.png").read_bytes()


def test_any_image_has_a_picture(where):
    save(where / "odd/dot.png", np.full((1, 1, 3), 7))
    save(where / "odd/alpha.png", np.full((9, 9, 4), 200))
    save(where / "odd/grey.png", np.arange(81).reshape(9, 9))
    out = show(where, *VIEW, *TINY, "input=odd", "mode.position=remove", "mode.upsample=bilinear", out="odd_out")
    assert {path.name: picture(path).shape for path in out.glob("*.png")} == {
        "dot.png": (1, 2, 3),
        "alpha.png": (9, 18, 3),
        "grey.png": (9, 18, 3),
    }


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ["mode=features needs images", "input="]),
        (("input=images", "mode.layer=2"), ["layers=[2]", "2 blocks"]),
        (("input=images", "mode.position=away"), ["mode.position=away", "remove"]),
        (("input=images", "mode.components=[]"), ["mode.components=[]", "[1,2,3]"]),
        (("input=images", "mode.components=[25]"), ["mode.components=[25]", "1 to 24"]),
        (("input=images", "mode.rank=24"), ["mode.rank=24", "24 channels"]),
        (("input=images", "mode.foreground=classes"), ["mode.foreground=classes", "resume=RUN"]),
        (("input=images", "mode.before=true"), ["mode.before=true", "resume=RUN"]),
        (("input=images", "mode.foreground=all"), ["mode.foreground=all", "component"]),
        (("input=images", "mode.basis=none.safetensors"), ["mode.basis", "none.safetensors"]),
        (("input=only_bad",), ["No input can be read", "bad.png"]),
    ],
)
def test_options_that_do_not_fit_are_refused(where, words, parts):
    (where / "only_bad").mkdir(exist_ok=True)
    (where / "only_bad/bad.png").write_bytes(b"no image")
    done = call(where, *VIEW, *TINY, *words)
    assert done.status == 1 and all(part in done.err for part in parts), done.err
