"""Exports are kept only where they answer as the trained model does, and what differs is named."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import write_data
from mistakes import assert_refused
from omegaconf import OmegaConf
from onnx import numpy_helper
from portable_parts import untrained_config

import dinoseg
from dinoseg.checkpoints import source
from dinoseg.checkpoints.source import ModelSource
from dinoseg.core.task import SEMANTIC
from dinoseg.extensions.export import onnx_export, onnx_file
from dinoseg.extensions.export.export import REPORT
from dinoseg.extensions.export.graph import record_of
from dinoseg.extensions.export.onnx_export import OnnxExport
from dinoseg.extensions.export.options import GraphOptions
from dinoseg.extensions.export.pictures import pictures
from dinoseg.extensions.export.program import ProgramExport
from dinoseg.segmenter import write
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

_traced = {}  # an export takes seconds: what torch makes of the same model is made once


@pytest.fixture
def cfg(compose, tmp_path):
    """Return the config of a tiny model with a linear head, and pictures beside it."""
    write_data(tmp_path / "data")
    return untrained_config(compose, tmp_path)


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Return a folder for exports, of which the first alone is traced."""
    (tmp_path / "out").mkdir()
    to_onnx, trace = onnx_file.to_onnx, onnx_export.trace

    def once(program, record):
        _traced.setdefault("model", program and to_onnx(program, record))
        return copy.deepcopy(_traced["model"])

    monkeypatch.setattr(onnx_export, "trace", lambda *words: None if _traced else trace(*words))
    monkeypatch.setattr(onnx_file, "to_onnx", once)
    return tmp_path / "out"


@pytest.mark.heavy
def test_an_export_is_proven_and_used_without_torch(cfg, out):
    OnnxExport()(ModelSource(cfg), out_dir=out)
    report = json.loads((out / REPORT).read_text())
    assert report["proven"] and report["agreement"] == 1 and report["pictures"] == 2
    assert report["miou"]["torch"] == report["miou"]["exported"] and report["references"] == "masks of the data set"
    assert report["bytes"] == (out / "model.onnx").stat().st_size and report["size"] == "any"
    assert sorted(path.name for path in out.iterdir()) == [REPORT, "model.onnx"]
    assert b"/tests/" not in (out / "model.onnx").read_bytes()  # no paths of this machine
    assert dinoseg.load(out / "model.onnx").predict(out.parent / "data/val/images/0.png").mask.shape == (32, 48)


def change_weights(model):
    """Change half of the head's weights by half of the largest."""
    tensor = next(entry for entry in model.graph.initializer if "classify.weight" in entry.name)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[: values.size // 2] += 0.5 * np.abs(values).max()
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def remove_weights(model):
    del model.graph.initializer[:]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("change", "reasons", "files"),
    [
        (change_weights, ("model.onnx was not saved", "of the pixels have the class of the trained model"), [REPORT]),
        (remove_weights, ("onnxruntime ", " cannot load it"), []),
    ],
)
def test_a_broken_export_is_refused(cfg, out, monkeypatch, change, reasons, files):
    finish = onnx_file.finish
    monkeypatch.setattr(onnx_file, "finish", lambda model, *words: finish(model, *words) or change(model))
    assert_refused(partial(OnnxExport(), ModelSource(cfg), out_dir=out), *reasons)
    assert [path.name for path in out.iterdir()] == files
    assert not files or not json.loads((out / REPORT).read_text())["proven"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"size": [1000000, 1000000]}, r"at most 32768 px per side, and no more pixels than \[8192,8192\]"),
        ({"size": [16384, 8192]}, "no more pixels than"),
        ({"size": [65536, 8]}, "at most 32768 px per side"),
        ({"size": [64, 64], "dynamic": True}, "is one size: leave it out"),
        ({"pixels": True, "dynamic": True}, "which needs a fixed size"),
        ({"opset": 17}, "export.opset=17: give 18"),
        ({"opset": 99}, "export.opset=99: give 18"),
    ],
)
def test_contradictory_options_are_refused_before_reading(words, reason):
    with pytest.raises(UserError, match=reason):
        OnnxExport(**words)


def test_graph_size_is_fixed_only_by_an_option():
    assert GraphOptions().why_fixed is None and GraphOptions(dynamic=True).why_fixed is None
    assert "export.dynamic" in GraphOptions(dynamic=False).why_fixed
    assert "export.pixels" in GraphOptions(pixels=True).why_fixed
    assert GraphOptions(size=[32768, 2048]).fixed_size_reason == (32768, 2048)  # as large as any


def test_size_too_large_for_the_images_is_refused():
    head = SimpleNamespace(no_classes=None, fixed_size_reason="it pools", mixture=False, no_object=False)
    mean = torch.zeros(1, 3, 1, 1)
    parts = {"head": head, "backbone": SimpleNamespace(mean=mean), "task": SEMANTIC}
    model = SimpleNamespace(patch_size=16, scale=1.0, longest=None, **parts)
    record, reason = record_of(model, None, GraphOptions(), (8192, 8170))
    assert record.size == (8192, 8176) and record.batch == 1 and reason == "it pools"
    for picture in ((8192, 8193), (8, 32769)):
        refused = partial(record_of, model, None, GraphOptions(), picture)
        assert_refused(refused, "size of the first image, [", "it pools", "too large. Set export.size")


def test_proof_images_are_spread_over_a_folder(tmp_path):
    for number in range(10):
        write_png(tmp_path / f"{number}.png", np.zeros((number + 1, 4, 3), np.uint8))
    (tmp_path / "run.log").touch()  # of something else: a run's folder holds its config, too
    (tmp_path / "classes.json").mkdir()
    unused = {"dataset": lambda split: pytest.fail("no split was given"), "num_classes": 2}
    found = pictures(str(tmp_path), 3, tmp_path, **unused)
    spread = [("0.png", (1, 4)), ("3.png", (4, 4)), ("6.png", (7, 4))]
    assert [(picture.path.name, picture.size) for picture in found] == spread
    assert len(pictures(str(tmp_path), 99, tmp_path, **unused)) == 10


def test_unusable_options_are_refused_before_tracing(cfg, out, monkeypatch):
    monkeypatch.setattr(onnx_export, "trace", lambda *_: pytest.fail("it was traced"))
    odd = "size=[500, 500]: give multiples of the patch size, 8 px, such as [496, 496]"
    assert_refused(partial(OnnxExport(size=[500, 500]), ModelSource(cfg), out_dir=out), odd)
    monkeypatch.setattr(source, "load_trained", lambda *_: pytest.fail("a model was made"))
    unverified = ("cannot be verified on the dataset's split test", "export.images")
    assert_refused(partial(OnnxExport(images="test"), ModelSource(cfg), out_dir=out), *unverified)
    scores = partial(write.export_model, ModelSource(cfg), out_dir=out, scores=str(out / "none"))
    assert_refused(scores, "export.scores=", "none is not a run folder of mode=eval")
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ("none", "file or folder not found"),
        ("cut", "cut.png as an image..*truncated"),
        ("film", "holds no image directly"),
        ("large", r"0.png \(300 x 400\) needs [.0-9]+ MiB for the comparison of scores"),
    ],
)
def test_unusable_images_are_refused_before_building_the_model(tmp_path, monkeypatch, images, reason):
    out = tmp_path
    cfg = OmegaConf.create({"resume": "run", "data": {"classes": ["dark", "bright"]}})
    (out / "film").mkdir()
    (out / "film/a.mp4").touch()
    for name in ("cut/cut.png", "large/0.png"):
        write_png(out / name, np.zeros((300, 400, 3), np.uint8))
    (out / "cut/cut.png").write_bytes((out / "cut/cut.png").read_bytes()[:500])
    monkeypatch.setattr("dinoseg.extensions.export.pictures.free_bytes", lambda _: 3.8e6 if images == "large" else 4e6)
    monkeypatch.setattr(source, "load_trained", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(UserError, match=reason):
        ProgramExport(images=str(out / images))(ModelSource(cfg), out_dir=out)


@pytest.mark.heavy
def test_large_graph_reads_its_external_weights(cfg, out, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    OnnxExport()(ModelSource(cfg), out_dir=out)
    assert sorted(path.name for path in out.iterdir()) == [REPORT, "model.onnx", "model.onnx.data"]
    assert dinoseg.load(out / "model.onnx").predict(out.parent / "data/val/images/0.png").mask.shape == (32, 48)


@pytest.mark.heavy
def test_lora_updates_are_merged_and_a_program_is_proven_too(compose, tmp_path):
    write_data(tmp_path / "data")
    cfg = untrained_config(compose, tmp_path, "adapter=lora", "adapter.rank=2")
    (tmp_path / "out").mkdir()
    ProgramExport(images=str(tmp_path / "data/val/images"))(ModelSource(cfg), out_dir=tmp_path / "out")
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["proven"] and report["references"] == "the trained model's own classes"
    assert not [name for name in torch.export.load(tmp_path / "out/model.pt2").state_dict if "lora" in name]


@pytest.mark.parametrize(("precision", "expected"), [("fp16", "fp32"), ("bf16", "bf16")])
def test_settings_of_a_gpu_do_not_reach_the_export_on_the_cpu(monkeypatch, precision, expected):
    def load(build):
        raise UserError(f"{build.settings('engine')}")

    monkeypatch.setattr(source, "load_trained", load)
    cfg = OmegaConf.create({"resume": "x", "engine": {"device": "auto", "precision": precision, "tf32": True}})
    with pytest.raises(UserError) as refused:
        ModelSource(cfg).load_on_cpu()
    assert str(refused.value) == str({"device": "cpu", "precision": expected, "tf32": False})
