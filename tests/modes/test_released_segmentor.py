"""Meta's segmentor from its two files: used as released, and with a new class layer for other classes."""

import json

import numpy as np
import pytest
import torch
from command_line import call, succeed
from meta_files import RELEASED, RELEASED_ARCH, write_released
from safetensors import safe_open

from dinoseg.experiment.models import ModelBuilder
from dinoseg.extensions.query_heads.mask2former.head import Mask2FormerHead
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.utils.images import read_ids, write_png

SIZE, LARGE = (64, 96), (80, 150)
QUIET = ("mode.metrics_only=true", "mode.report=false")
SMALL = [*RELEASED, "engine=cpu", "engine.workers=0", "engine.precision=fp32"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def expected_scores(files):
    """Return the scores of a picture by Meta's evaluation."""
    return by_hand(files, picture(LARGE))


def weights(files):
    return [f"backbone.weights={files[0]}", f"head.weights={files[1]}"]


def picture(size=SIZE):
    return np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)


# as published, but for sizes: windows of 64 px every 43 over an image whose shorter side is brought to 64
SMALLER = ["inference.size=64", "inference.stride=43", "inference.shortest=64"]


def by_hand(files, image):
    """Return the semantic map of an image by Meta's evaluation (its `slide_inference`), from the parts alone.

    Only the backbone and the sums over the queries are in bfloat16.
    """
    arch = {**RELEASED_ARCH, "num_register_tokens": 4, "layerscale_value": 1.0}
    backbone = TransformersVit("dinov3_vit", arch, str(files[0]), 16, "quarters").eval()
    head = Mask2FormerHead(64, 4, 150, hidden_dim=64, feedforward_dim=4096, weights=str(files[1])).eval()
    resize = torch.nn.functional.interpolate
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    short = min(image.shape[:2])
    size = [round(64 * side / short) for side in image.shape[:2]]
    pixels = resize(pixels, size, mode="bilinear", antialias=True)
    total, counts = torch.zeros(1, 150, *size), torch.zeros(*size)
    for row, column in np.ndindex(*(max(side - 64 + 43 - 1, 0) // 43 + 1 for side in size)):
        bottom, right = min(row * 43 + 64, size[0]), min(column * 43 + 64, size[1])
        place = (..., slice(bottom - 64, bottom), slice(right - 64, right))
        with torch.inference_mode():
            with torch.autocast("cpu", torch.bfloat16):
                features = backbone(pixels[place])
            outputs = head.decode(features, backbone.pixels(pixels[place]))
        masks = resize(outputs.mask_logits, (64, 64), mode="bilinear").sigmoid()
        classes = outputs.class_logits.softmax(-1)[..., :150]
        total[place] += torch.einsum("bqk,bqhw->bkhw", classes.bfloat16(), masks.bfloat16())
        counts[place] += 1
    return resize(total / counts, image.shape[:2], mode="bilinear")[0]


def test_predictions_equal_the_released_segmentor(files, expected_scores, tmp_path):
    write_png(tmp_path / "street.png", picture(LARGE))
    words = ["mode=predict", "hparam=ade20k_m2f", *SMALL, *weights(files), *SMALLER, "input=street.png"]
    succeed(tmp_path, *words)
    found = np.load(next(tmp_path.rglob("segmentation_raw.npy")))
    best = expected_scores.topk(2, dim=0)
    sure = (best.values[0] - best.values[1] > 2**-7 * best.values[0]).numpy()  # two roundings to bfloat16
    assert sure.mean() > 0.5 and len(np.unique(found)) > 3
    np.testing.assert_array_equal(found[sure], best.indices[0].numpy()[sure])


def test_the_recipe_has_the_published_windows(compose):
    strategy = ModelBuilder(compose("hparam=ade20k_m2f")).part("inference")
    assert (strategy.size, strategy.shortest, strategy.average, strategy.weights) == (
        (896, 896),
        896,
        "scores",
        "uniform",
    )
    assert strategy.starts(0, 1500) == [0, 596, 604]


@pytest.mark.heavy
def test_scores_equal_the_released_segmentor(files, expected_scores, tmp_path):
    root = tmp_path / "ade"
    mask = (expected_scores.argmax(dim=0).numpy() + 1).astype(np.uint8)
    for name in ("training", "validation"):
        write_png(root / f"images/{name}/a.png", picture(LARGE))
        write_png(root / f"annotations/{name}/a.png", mask)  # 0 is "other" in these files
    words = ["mode=eval", "hparam=ade20k_m2f", *SMALL, *weights(files), *SMALLER, "data.root=ade", *QUIET]
    succeed(tmp_path, *words)
    scores = json.loads(next(tmp_path.rglob("scores.json")).read_text())
    assert scores["accuracy"] > 0.99 and len(scores["classes"]) == 150


@pytest.mark.parametrize(
    ("recipe", "columns"), [pytest.param("idd_m2f", 26, marks=pytest.mark.heavy), ("idd_m2f_no_object", 27)]
)
def test_new_class_layer_can_be_trained(files, tmp_path, recipe, columns):
    for split in ("train", "val"):
        write_png(tmp_path / f"idd/leftImg8bit/{split}/1/a_leftImg8bit.png", picture())
        mask = np.random.default_rng(1).choice([0, 3, 25, 255], SIZE).astype(np.uint8)
        write_png(tmp_path / f"idd/gtFine/{split}/1/a_gtFine_labellevel3Ids.png", mask)
    steps = ["trainer.steps=1", "resolution.crop=[64,96]", "data.batch_size=1", "mode.pictures=0"]
    steps += ["data.root=idd", "backbone.dtype=float32", "hydra.run.dir=run"]
    steps += ["loss.criterion.num_points=64"] if recipe == "idd_m2f_no_object" else []
    succeed(tmp_path, "mode=train", f"hparam={recipe}", *SMALL, *QUIET, *weights(files), *steps)
    with safe_open(tmp_path / "run/checkpoints/best.safetensors", "pt") as file:
        held = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    layer = {name: shape for name, shape in held.items() if "class_embed" in name}
    prefix = "model/head.predictor.class_embed"
    assert layer == {f"{prefix}.weight": [columns, 64], f"{prefix}.bias": [columns]}
    assert all(name in layer or "running" in name or "num_batches" in name for name in held)
    if recipe == "idd_m2f_no_object":
        return
    write_png(tmp_path / "a.png", picture())
    succeed(tmp_path, "mode=predict", "resume=run", "input=a.png", "engine=cpu")
    assert read_ids(next(tmp_path.rglob("segmentation_colored.png"))).shape[:2] == SIZE


def test_untrained_or_missing_parts_of_a_segmentor_are_refused(files, tmp_path):
    write_png(tmp_path / "a.png", picture())
    recipe = ["hparam=ade20k_m2f", *SMALL]
    hub = ["hparam=ade20k_m2f", "backbone.weights=nobody/nothing", "engine=cpu"]  # named before it is fetched
    for words, message in (
        (["hparam=idd_m2f", *SMALL, *weights(files)], "this mode needs a trained model"),
        ([*recipe, weights(files)[0], f"head.weights={files[0]}"], f"head.weights={files[0]}"),
        (hub, "head.weights is not set"),
        ([*hub, "head.weights=typo.pth"], "head.weights=typo.pth: file or folder not found"),
    ):
        done = call(tmp_path, "mode=predict", "input=a.png", *words)
        assert done.status == 1 and message in done.err, done.err
