"""Exported graphs without torch: their pictures as torch makes them, what they say checked, hostile files refused."""

import errno
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
from dinoseg.export.runtime.onnx_check import read_metadata
from dinoseg.export.runtime.onnx_model import load_onnx
from dinoseg.export.runtime.onnx_pictures import GraphRuntime, bands, pixels
from dinoseg.export.runtime.onnx_record import KEY, OUTPUTS, GraphRecord, Layout
from dinoseg.models.heads.semantic import semantic_map
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

RECORD = GraphRecord(8, 1.0, None, None, None, None, None, (0.5, 0.25, 0.125), "scores", False, False, 18, "float32")
LABELS = {"classes": ["dark", "bright"], "palette": [[0, 0, 0], [255, 255, 255]], "ignore_index": 255}


def test_layers_reach_their_threshold_at_equal_probability():
    scores = [np.zeros((1, 3, 1, 1), np.float32)]
    runtime = GraphRuntime(lambda images: scores, replace(RECORD, thresholds=[0.4, 0.5, 0.6]))
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
    page = ROOT / "docs/predicting.md"
    (code,) = [block for _, block in blocks(page) if "onnxruntime.InferenceSession" in block]
    names = {}
    code = code.replace("EXPORTED_ONNX/model.onnx", str(path)).replace("IMAGE", str(tmp_path / "image.png"))
    exec(compile(code, page, "exec"), names)
    wanted = load_onnx(path, device="cpu").runtime.ids([image])[0]
    assert 0 < wanted.mean() < 1 and (names["mask"] == wanted).all()


def test_documented_keys_are_those_of_the_metadata():
    section = (ROOT / "docs/predicting.md").read_text().split("### ONNX without dinoseg")[1].split("\n### ")[0]
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
    draw, layout = torch.Generator().manual_seed(0), RECORD.layout(size)
    grid = [side // 8 for side in layout.padded]
    maps = torch.randn(1, 5, *grid, generator=draw)
    given = np.concatenate(list(bands([maps[0].numpy()], size, layout.valid, RECORD)), axis=1)
    np.testing.assert_allclose(given, upsample(maps.double(), size, layout.valid)[0], atol=1e-5)
    masks, classes = 9 * torch.randn(1, 7, *grid, generator=draw), torch.randn(1, 7, 4, generator=draw)
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
            except dinoseg.utils.errors.UserError as error:
                print(error)
    """
    where = {"PYTHONPATH": str(Path(dinoseg.__file__).parent.parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown, loading, *with_hub = done.stdout.splitlines()
    assert shown == "320 {'dark': 320, 'bright': 320} [  0 255] [  0 255]"
    assert loading.startswith("mask.png: needs ") and "is not installed: pip install" in loading
    assert "give the ONNX file that mode=export export=onnx writes of the model." in loading
    without_client = "me/mine: a hub needs huggingface_hub, which is not installed: pip install huggingface_hub"
    assert with_hub == [without_client] * 2


@pytest.mark.parametrize(
    ("key", "value"), [("inference", "windows"), ("precision", "bf16"), ("backbone", "b.pth"), ("head", "h.pth")]
)
def test_unsupported_option_of_an_onnx_file_is_refused(tmp_path, key, value):
    path = write_model(tmp_path, model())
    refused = (f"{key}={value}: ", "model.onnx is an ONNX file, which processes whole images")
    assert_refused(lambda: dinoseg.load(path, **{key: value}), *refused)
    out = dinoseg.load(path, inference="whole", precision="fp32").predict(np.zeros((9, 9, 3), np.uint8))
    assert out.mask.any() == 0


def external(location, length=4096, more=()):
    tensor = TensorProto(name="far", data_type=TensorProto.FLOAT, dims=[1024], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(length)), *more):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def huge():
    return TensorProto(name="huge", data_type=TensorProto.FLOAT, dims=[2**20, 2**20], raw_data=b"1234")


def with_function(made):
    made.functions.append(onnx.FunctionProto(name="Mine"))
    return made


def branch_nodes():
    body = helper.make_graph([], "body", [], [])
    return [helper.make_node("If", ["image"], ["scores"], then_branch=body, else_branch=body)]


HOSTILE = {
    "outside its folder": lambda: model(initializers=[external("../../secret")]),
    "outside its folder ": lambda: model(initializers=[external("/etc/passwd")]),
    "outside its folder  ": lambda: model(initializers=[external("..\\secret")]),
    "missing or not a regular file": lambda: model(initializers=[external("nothing.data")]),
    "missing or not a regular file ": lambda: model(initializers=[external("link.data")]),
    "is truncated": lambda: model(initializers=[external("short.data")]),
    "unknown or duplicated": lambda: model(initializers=[external("link.data", more=[("location", "/")])]),
    "unknown or duplicated ": lambda: model(initializers=[external("link.data", more=[("basepath", "/")])]),
    "of type 1 and shape": lambda: model(initializers=[TensorProto(name="deep", data_type=1, dims=[1] * 65)]),
    "a tensor of 4398046511104 bytes has 4": lambda: model(initializers=[huge()]),
    "operators of 'evil'": lambda: model(nodes=[helper.make_node("Run", ["image"], ["scores"], domain="evil")]),
    "operators of 'evil' ": lambda: model(opsets=("", "evil")),
    "graphs inside graphs": lambda: model(nodes=branch_nodes()),
    "functions or training code": lambda: with_function(model()),
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_hostile_files_are_refused_before_onnxruntime_sees_them(tmp_path, monkeypatch, reason):
    (tmp_path / "short.data").write_bytes(b"123")
    (tmp_path / "secret").write_bytes(b"0" * 4096)
    (tmp_path / "link.data").symlink_to(tmp_path / "secret")
    monkeypatch.setattr("dinoseg.export.runtime.onnx_model.open_session", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(UserError, match=reason.strip()):
        dinoseg.load(write_model(tmp_path, HOSTILE[reason]()))


@pytest.mark.parametrize("content", [b"", b"\x00", b"no model at all", b"\x3a\xff\xff\xff\xff\x7f", b"\x80" * 40])
def test_foreign_onnx_file_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert_refused(lambda: dinoseg.load(path), "not an ONNX file of dinoseg")


def test_every_cut_and_changed_byte_ends_in_an_error_or_a_model(tmp_path):
    whole, draw, path = model().SerializeToString(), np.random.default_rng(0), tmp_path / "model.onnx"
    for _ in range(300):
        damaged = bytearray(whole[: draw.integers(1, len(whole) + 1)])
        damaged[draw.integers(len(damaged))] = draw.integers(256)
        path.write_bytes(damaged)
        try:
            read_metadata(path, KEY)
        except UserError:
            continue


@pytest.mark.parametrize(
    ("graph", "labels", "reason"),
    [
        ({"version": 2}, {}, "version"),
        ({"kind": "code"}, {}, "kind"),
        ({"scale": 0}, {}, "scale"),
        ({"size": [0, 8]}, {}, "size"),
        ({}, {"classes": ["x" * 2**20]}, "its description is damaged"),
    ],
)
def test_invalid_metadata_of_an_onnx_file_is_refused(tmp_path, graph, labels, reason):
    made = model()
    made.metadata_props[0].value = json.dumps({"graph": {**RECORD.plain(), **graph}, **LABELS, **labels})
    assert_refused(lambda: dinoseg.load(write_model(tmp_path, made)), reason)


def load(made, **options):
    return lambda: dinoseg.load(write_model(Path.cwd(), made), **options)


def run_newer_version():
    newer = model(opsets=("", "ai.onnx"))
    newer.ir_version = 99
    load(newer)()


test_message_names_value_and_remedy = refusals(
    {
        "a threshold too few": (load(model(replace(RECORD, thresholds=[0.5]))), "threshold", "Export the model again"),
        "a threshold too many": (load(model(replace(RECORD, thresholds=[0.5] * 3))), "threshold", "Export the model"),
        "a threshold above 1": (load(model(replace(RECORD, thresholds=[0.5, 1.5]))), "threshold", "Export the model"),
        "no such device": (load(model(), device="cuda"), "device=cuda: this onnxruntime computes on cpu"),
        "a newer format": (run_newer_version, " cannot run it ", "Install a newer one, or export the model"),
    }
)


def lying_model(nodes=None, **changes):
    """Return a model whose description says something else than its graph does."""
    made = model(
        record=changed_record(**changes.pop("record", {})), labels={**LABELS, **changes.pop("labels", {})}, nodes=nodes
    )
    for part, value in changes.items():
        getattr(made.graph, part)[0].CopyFrom(value)
    return made


WHOLE = helper.make_tensor_value_info("scores", TensorProto.INT64, ["batch", 3, "h", "w"])
LIES = {
    "its inputs or outputs differ from": lambda: lying_model(record={"kind": "masks", "mixture": True}),
    "its inputs or outputs differ from ": lambda: lying_model(
        input=helper.make_tensor_value_info("picture", TensorProto.FLOAT, ["batch", 3, "height", "width"]),
        nodes=[pool("picture"), CONV],
    ),
    r"returns float32 \[1, 2, 3, 4\] for 1 images, which are not scores of its 3 classes": lambda: lying_model(
        labels={"classes": ["a", "b", "c"], "palette": [[0, 0, 0]] * 3}
    ),
    r"returns int64 \[1, 3, 3, 4\] for 1 images": lambda: lying_model(
        labels={"classes": ["a", "b", "c"], "palette": [[0, 0, 0]] * 3},
        nodes=[pool("image"), helper.make_node("Cast", ["grid"], ["scores"], to=TensorProto.INT64)],
        output=WHOLE,
    ),
    r"returns float32 \[1, 2, 1, 1, 3, 4\] for 1 images": lambda: lying_model(
        nodes=[
            pool("image"),
            helper.make_node("Conv", ["grid", "weight", "bias"], ["flat"]),
            helper.make_node("Constant", [], ["axes"], value_ints=[2, 3]),
            helper.make_node("Unsqueeze", ["flat", "axes"], ["scores"]),
        ],
        output=helper.make_tensor_value_info("scores", TensorProto.FLOAT, None),
    ),
    r"onnxruntime cannot process images \[1, 3, 24, 32\] with it": lambda: lying_model(
        input=helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])
    ),
    "20 x 30 would enter the model at .*; the limit is 1000 pixels": lambda: lying_model(record={"scale": 64.0}),
}


@pytest.mark.parametrize("reason", LIES)
def test_graph_that_contradicts_its_metadata_raises_an_error(tmp_path, monkeypatch, reason):
    monkeypatch.setattr("dinoseg.export.runtime.onnx_pictures._MAX_PIXELS", 1000)
    with pytest.raises(UserError, match=reason.strip()):
        dinoseg.load(write_model(tmp_path, LIES[reason]())).predict(np.zeros((20, 30, 3), np.uint8))


@pytest.mark.parametrize(
    ("bound", "most", "reason"),
    [
        ("onnx_check._MAX_FIELDS", 9, "it has more than 9 fields"),
        ("onnx_check._LONGEST_TEXT", 9, "a text in it has .* bytes"),
        ("onnx_check._MAX_NODES", 1, "it has more than 1 nodes"),
    ],
)
def test_metadata_reading_is_bounded(tmp_path, monkeypatch, bound, most, reason):
    monkeypatch.setattr(f"dinoseg.export.runtime.{bound}", most)
    with pytest.raises(UserError, match=reason):
        read_metadata(write_model(tmp_path, model()), KEY)


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
    made.metadata_props[0].value = json.dumps({"graph": {**record.plain(), "no_object": not no_object}, **LABELS})
    wrong = dinoseg.load(write_model(tmp_path, made))
    assert_refused(lambda: wrong.predict(image), "which are not scores of its 2 classes")


def test_onnx_file_is_run_as_onnx_whatever_its_suffix(tmp_path):
    path = write_model(tmp_path, model()).rename(tmp_path / "model.ort")  # onnxruntime has a format of that name
    assert dinoseg.load(path, runtime="onnx").predict(np.zeros((20, 30, 3), np.uint8)).mask.sum() == 0


def test_onnx_read_errors_are_one_message(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    path = write_model(tmp_path, model())
    path.chmod(0o400)  # to read is enough
    assert dinoseg.load(path).classes == ("dark", "bright")
    monkeypatch.setattr("dinoseg.export.runtime.onnx_check.mmap.mmap", fail)
    assert_refused(lambda: load_onnx(path), "Cannot read ", "model.onnx (Input/output error)", "Check the path")
