"""Exported graphs without torch: their pictures as torch makes them, and what their files say."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from docs_pages import ROOT, blocks
from mistakes import assert_refused, refusals
from onnx import TensorProto, helper, numpy_helper

import dinoseg
from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import MaskOutputs
from dinoseg.extensions.export.onnx_model import ONNX_WEIGHTS, load_onnx
from dinoseg.extensions.export.onnx_pictures import GraphRuntime, bands, pixels
from dinoseg.extensions.export.onnx_record import KEY, OUTPUTS, GraphRecord, Layout
from dinoseg.models.heads.semantic import semantic_map
from dinoseg.utils.images import write_png

RECORD = GraphRecord(8, 1.0, None, None, None, None, None, (0.5, 0.25, 0.125), "scores", False, False, 18, "float32")
LABELS = {"classes": ["dark", "bright"], "palette": [[0, 0, 0], [255, 255, 255]], "ignore_index": 255}


def test_layers_reach_their_threshold_at_equal_probability():
    scores = [np.zeros((1, 3, 1, 1), np.float32)]
    runtime = GraphRuntime(lambda images: scores, replace(RECORD, thresholds=[0.4, 0.5, 0.6]))
    assert runtime.task == "multilabel" and not runtime.things
    ids = runtime.ids([np.zeros((2, 2, 3), np.uint8)])
    assert ids[0].tolist() == [[[1, 1], [1, 1]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (40, 64)),
        ({}, (37, 61)),
        ({"scale": 0.7}, (37, 61)),
        ({"longest": 30}, (37, 61)),
        ({"typical": 24, "largest": 60}, (37, 61)),
        ({"typical": 24, "largest": 61}, (37, 61)),
        ({"thresholds": [0.3, 0.6]}, (37, 61)),
    ],
    ids=["whole", "padded", "scale", "longest", "larger", "largest", "layers"],
)
def test_documented_code_gives_the_same_mask(tmp_path, monkeypatch, changes, size):
    path = write_model(tmp_path, model(replace(RECORD, **changes)))
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    write_png(tmp_path / "image.png", image)
    page = ROOT / "docs/onnx.md"
    code = "".join(
        block for _, block in blocks(page, "python|py") if re.search("import onnxruntime|  # class ids", block)
    )
    names = {}
    code = code.replace("EXPORTED_ONNX/model.onnx", str(path)).replace("IMAGE", str(tmp_path / "image.png"))
    exec(compile(code, page, "exec"), names)
    wanted = load_onnx(path, device="cpu").runtime.ids([image])[0]
    assert 0 < wanted.mean() < 1 and (names["mask"] == wanted).all()


def test_documented_keys_are_those_of_the_metadata():
    section = (ROOT / "docs/onnx.md").read_text().split("\n## Objects")[0]
    assert set(re.findall(r"`graph\.(\w+)`", section)) == set(RECORD.plain())
    assert all(f"`{key}`" in section for key in [*LABELS, "facts", *OUTPUTS])


def changed_record(**values):
    return GraphRecord.of(json.loads(json.dumps({**RECORD.plain(), **values})), "model.onnx")


CONV = helper.make_node("Conv", ["grid", "weight", "bias"], ["scores"])


def pool(name):
    return helper.make_node("AveragePool", [name], ["grid"], kernel_shape=[8, 8], strides=[8, 8])


def model(record=RECORD, labels=LABELS, nodes=None, initializers=(), opsets=("",)):
    """Return an ONNX model whose two scores are minus and plus the red channel, on a grid of 8 px."""
    side = ["batch", 3, "height", "width"]
    weight = np.zeros((2, 3, 1, 1), np.float32)
    weight[:, 0, 0, 0] = -1, 1
    weights = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.float32([0.5, -0.5]), "bias")]
    graph = helper.make_graph(
        [pool("image"), CONV] if nodes is None else nodes,
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, side)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 2, "h", "w"])],
        [*weights, *initializers],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid(name, 18) for name in opsets], ir_version=10)
    entry = made.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps({"graph": record.plain(), **labels})
    return made


def write_model(folder, made):
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("size", "content"), [((37, 50), (37, 50)), ((90, 41), (30, 14)), ((1, 1), (5, 3)), ((4, 200), (1, 33))]
)
def test_images_are_resized_as_in_torch(size, content):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    given = pixels(image, Layout(content, (40, 56)), (0.5, 0.25, 0.125))
    floats = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    wanted = F.interpolate(floats, content, mode="bilinear", antialias=True)[0]
    np.testing.assert_allclose(given[:, : content[0], : content[1]], wanted, atol=1e-6)
    assert (given[:, content[0] :] == np.float32([0.5, 0.25, 0.125])[:, None, None]).all()


@pytest.mark.parametrize("size", [(37, 50), (1, 1), (8, 8), (3, 101)])
def test_scores_and_masks_reach_pixels_as_in_torch(size):
    draw = torch.Generator().manual_seed(0)
    layout = RECORD.layout(size)
    grid = [side // 8 for side in layout.padded]
    maps = torch.randn(1, 5, *grid, generator=draw)
    given = np.concatenate(list(bands([maps[0].numpy()], size, layout.valid, RECORD)), axis=1)
    np.testing.assert_allclose(given, upsample(maps.double(), size, layout.valid)[0], atol=1e-5)
    masks = 9 * torch.randn(1, 7, *grid, generator=draw)
    classes = torch.randn(1, 7, 4, generator=draw)
    for no_object in (True, False):
        record = changed_record(kind="masks", mixture=True, no_object=no_object)
        given = np.concatenate(list(bands([classes[0].numpy(), masks[0].numpy()], size, layout.valid, record)), axis=1)
        wanted = semantic_map(MaskOutputs(classes, masks), size, layout.valid, no_object)[0]
        np.testing.assert_allclose(given, wanted, atol=1e-5)


def test_layouts_follow_the_size_policy_or_fit_one_size():
    assert changed_record(longest=64).layout((100, 200)) == Layout((32, 64), (32, 64))
    assert changed_record(typical=48, largest=99).layout((100, 50)) == Layout((48, 24), (48, 24))
    assert changed_record(typical=48, largest=100).layout((100, 50)).content == (100, 50)
    fixed = changed_record(size=[48, 64], batch=1)
    assert fixed.layout((43, 61)) == Layout((43, 61), (48, 64))  # its own grid: as it is
    assert fixed.layout((480, 320)) == Layout((48, 32), (48, 64))
    assert fixed.layout((1, 30_000)) == Layout((1, 64), (48, 64))


def test_onnx_file_is_a_usable_model(tmp_path):
    image = np.zeros((20, 30, 3), np.uint8)
    image[:, 16:] = 255
    pixels_of_two = changed_record(kind="pixels", size=[24, 32], batch=2)
    for record in (RECORD, changed_record(size=[24, 32], batch=1), pixels_of_two):
        path = write_model(tmp_path, model(record))
        out = dinoseg.load(path).predict([image, image, 255 - image])
        assert (out[1].mask == (image[..., 0] > 0)).all() and (out[2].mask == (image[..., 0] == 0)).all()
        assert out[0].probabilities.shape == (2, 20, 30)
        np.testing.assert_allclose(out[0].probabilities.sum(axis=0), 1, atol=1e-6)


def test_numpy_pillow_and_onnxruntime_are_enough(tmp_path):
    image = np.zeros((20, 32, 3), np.uint8)
    image[:, 16:] = 255
    write_png(tmp_path / "images/a.png", image)
    write_model(tmp_path, model())
    code = """if True:
        import sys

        class OnlyThese:
            def find_spec(name, path=None, target=None):
                if name.partition(".")[0] not in {*sys.stdlib_module_names, "dinoseg", "numpy", "PIL", "onnxruntime"}:
                    raise ModuleNotFoundError(name, name=name)

        sys.meta_path.insert(0, OnlyThese)
        import dinoseg
        model = dinoseg.load("model.onnx")
        (out,) = model.predict("images")
        out.save("mask.png")
        assert (model.predict(out.image).mask == out.mask).all()
        assert (out.probabilities.argmax(axis=0) == out.mask).all()
        print(out.mask.sum(), out.areas, out.overlay(0.5)[0, ::20, 0], out.overlay(1)[0, ::20, 0])
        for act, name in (dinoseg.load, "mask.png"), (model.push_to_hub, "me/mine"), (model.from_pretrained, "me/mine"):
            try:
                act(name)
            except (dinoseg.utils.errors.UserError, ModuleNotFoundError) as error:
                print(error)
    """
    where = {"PYTHONPATH": str(Path(dinoseg.__file__).parent.parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown, loading, pushing, fetching = done.stdout.splitlines()
    assert shown == "320 {'dark': 320, 'bright': 320} [  0 255] [  0 255]"
    assert loading and pushing == "jinja2" and "(ModuleNotFoundError: huggingface_hub)" in fetching


@pytest.mark.parametrize(
    ("key", "value"), [("inference", "windows"), ("precision", "bf16"), ("backbone", "b.pth"), ("head", "h.pth")]
)
def test_unsupported_option_of_an_onnx_file_is_refused(tmp_path, key, value):
    path = write_model(tmp_path, model())
    refused = (f"{key}={value}: ", "model.onnx is an ONNX file, which processes whole images")
    assert_refused(lambda: dinoseg.load(path, **{key: value}), *refused)
    out = dinoseg.load(path, inference="whole", precision="fp32").predict(np.zeros((9, 9, 3), np.uint8))
    assert out.mask.any() == 0


@pytest.mark.parametrize("content", [b"", b"\x00", b"no model at all", b"\x3a\xff\xff\xff\xff\x7f", b"\x80" * 40])
def test_damaged_onnx_file_is_one_error(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert_refused(lambda: dinoseg.load(path), f"{path}: onnxruntime ", " cannot load it ", "export the model again")


def test_missing_weights_file_of_an_onnx_file_is_named(tmp_path):
    made = model()
    onnx.save_model(made, tmp_path / "model.onnx", save_as_external_data=True, location=ONNX_WEIGHTS, size_threshold=0)
    assert dinoseg.load(tmp_path / "model.onnx").classes == ("dark", "bright")
    (tmp_path / ONNX_WEIGHTS).unlink()
    assert_refused(lambda: dinoseg.load(tmp_path / "model.onnx"), " cannot load it ", f"that {ONNX_WEIGHTS}")


def test_missing_onnxruntime_is_one_error(tmp_path, monkeypatch):
    path = write_model(tmp_path, model())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert_refused(lambda: dinoseg.load(path), "need onnxruntime: pip install onnxruntime")


def without_metadata():
    made = model()
    del made.metadata_props[:]
    return made


def with_record(**values):
    made = model()
    made.metadata_props[0].value = json.dumps({"graph": {**RECORD.plain(), **values}, **LABELS})
    return made


def load(made, **options):
    return lambda: dinoseg.load(write_model(Path.cwd(), made), **options)


def run_newer_version():
    newer = model(opsets=("", "ai.onnx"))
    newer.ir_version = 99
    load(newer)()


test_message_names_value_and_remedy = refusals(
    {
        "no metadata": (load(without_metadata()), "model.onnx is not an ONNX file of dinoseg", "mode=export"),
        "another version": (load(with_record(version=2)), "version", "Export the model again"),
        "an unknown kind": (load(with_record(kind="code")), "kind", "Export the model again"),
        "no scale": (load(with_record(scale=0)), "scale", "Export the model again"),
        "no size": (load(with_record(size=[0, 8])), "size", "Export the model again"),
        "a threshold too few": (load(model(replace(RECORD, thresholds=[0.5]))), "threshold", "Export the model again"),
        "a threshold too many": (load(model(replace(RECORD, thresholds=[0.5] * 3))), "threshold", "Export the model"),
        "a threshold above 1": (load(model(replace(RECORD, thresholds=[0.5, 1.5]))), "threshold", "Export the model"),
        "no such device": (load(model(), device="cuda"), "device=cuda: this onnxruntime computes on cpu"),
        "a newer format": (run_newer_version, " cannot load it ", "install a newer onnxruntime, or export the model"),
    }
)


def predict_fixed_size():
    """Run a graph for images of 8 x 8 whose description allows any size."""
    made = model()
    made.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8]))
    load(made)().predict(np.zeros((20, 30, 3), np.uint8))


def test_error_of_onnxruntime_names_the_size_of_the_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(predict_fixed_size, "onnxruntime cannot process images [1, 3, 24, 32] with it", "smaller images")


def test_image_beyond_the_limit_of_pixels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dinoseg.extensions.export.onnx_pictures._MAX_PIXELS", 1000)
    loaded = dinoseg.load(write_model(tmp_path, model(changed_record(scale=64.0))))
    image = np.zeros((20, 30, 3), np.uint8)
    assert_refused(lambda: loaded.predict(image), "20 x 30 would enter the model at ", "the limit is 1000 pixels")


@pytest.mark.parametrize("no_object", [True, False])
def test_mask_outputs_are_read_as_the_metadata_states(tmp_path, no_object):
    record = changed_record(kind="masks", mixture=True, no_object=no_object)
    made = model(record)
    del made.graph.output[:]
    queries = np.float32([[[9, 0, 0], [0, 9, 0]]])[..., : 2 + no_object]  # one of each class
    made.graph.initializer.append(numpy_helper.from_array(queries, "class_logits"))
    made.graph.node[1].output[0] = "mask_logits"
    for name in ("class_logits", "mask_logits"):
        made.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    image = np.zeros((16, 24, 3), np.uint8)
    image[:, 12:] = 255
    assert (dinoseg.load(write_model(tmp_path, made)).predict(image).mask == (image[..., 0] > 0)).all()
