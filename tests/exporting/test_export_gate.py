"""Exports are kept only where they answer as the trained model does, and what differs is named."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import write_data
from onnx import numpy_helper
from portable_parts import TINY, untrained

import dinoseg
from dinoseg.errors import UserError
from dinoseg.exporting import onnx_export, onnx_file, proof, tensorrt
from dinoseg.exporting.export import REPORT
from dinoseg.exporting.onnx_export import export_onnx
from dinoseg.exporting.pictures import Picture
from dinoseg.exporting.program import export_program
from dinoseg.runs.resume import alone
from dinoseg.training import checkpoint

_traced = {}  # an export takes seconds: what torch makes of the same model is made once


@pytest.fixture
def cfg(compose, tmp_path):
    """Return the config of a tiny model with a linear head, and pictures beside it."""
    write_data(tmp_path / "data")
    path = untrained(compose, tmp_path, *TINY, "head=linear")
    return alone(path, checkpoint.describe(path), {"engine.device": "cpu", "data.root": str(tmp_path / "data")})


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


def change_weight(model, part):
    """Change a weight of a model by a tenth of its largest."""
    tensor = next(entry for entry in model.graph.initializer if part in entry.name)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[: values.size // 2] += 0.5 * np.abs(values).max()
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.heavy
def test_an_export_is_proven_and_used_without_torch(cfg, out):
    export_onnx(cfg, out_dir=out)
    report = json.loads((out / REPORT).read_text())
    assert report["proven"] and report["agreement"] == 1 and report["pictures"] == 2
    assert report["miou"]["torch"] == report["miou"]["exported"] and report["references"] == "masks of the data set"
    assert report["bytes"] == (out / "model.onnx").stat().st_size and report["size"] == "any"
    assert sorted(path.name for path in out.iterdir()) == [REPORT, "model.onnx"]
    assert b"/tests/" not in (out / "model.onnx").read_bytes()  # no paths of this machine
    code = """if True:
        import sys
        for name in ("torch", "hydra", "omegaconf", "transformers", "onnx"):
            sys.modules[name] = None
        import dinoseg
        print(dinoseg.load("model.onnx", runtime="onnx").predict(sys.argv[1]).mask.shape)
    """
    where = {"PYTHONPATH": str(Path(dinoseg.__file__).parent.parent), "PATH": ""}
    words = [sys.executable, "-c", code, str(out.parent / "data/val/images/0.png")]
    done = subprocess.run(words, cwd=out, env=where, capture_output=True, text=True, check=False)
    assert done.stdout == "(32, 48)\n", done.stderr


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("part", "layer"), [("classify.weight", "the layer head.classify"), ("std", "the layer backbone.model.embeddings")]
)
def test_a_broken_export_is_refused_and_its_layer_named(cfg, out, monkeypatch, part, layer):
    finish = onnx_file.finish

    def break_and_finish(model, *words):
        change_weight(model, part)
        finish(model, *words)

    monkeypatch.setattr(onnx_file, "finish", break_and_finish)
    with pytest.raises(UserError, match=f"model.onnx was not kept.*What differs: {layer}"):
        export_onnx(cfg, out_dir=out)
    assert [path.name for path in out.iterdir()] == [REPORT]
    assert not json.loads((out / REPORT).read_text())["proven"]


@pytest.mark.heavy
def test_pictures_resized_otherwise_are_refused(cfg, out, monkeypatch):
    finish = onnx_file.finish
    cfg.resolution.scale = 0.5
    other = lambda model, record, about: finish(model, replace(record, scale=0.25), about)  # noqa: E731
    monkeypatch.setattr(onnx_file, "finish", other)
    monkeypatch.setattr("dinoseg.exporting.layers.pixels", lambda image, layout, fill: np.zeros((3, *layout.padded)))
    with pytest.raises(UserError, match="What differs: the resizing of pictures before the first layer"):
        export_onnx(cfg, out_dir=out)


@pytest.mark.heavy
def test_a_file_that_does_not_run_is_refused_with_its_words(cfg, out, monkeypatch):
    finish = onnx_file.finish

    def drop(model, *words):
        finish(model, *words)
        del model.graph.initializer[:]

    monkeypatch.setattr(onnx_file, "finish", drop)
    with pytest.raises(UserError, match="gives no answer: .*onnxruntime cannot run it"):
        export_onnx(cfg, out_dir=out)
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"images": "none"}, "No such file or folder"),
        ({"images": "test"}, "cannot be proven on the data set's split test.*export.images"),
        ({"opset": 17}, "export.opset=17: give 18"),
        ({"precision": "int4"}, "export.precision=int4 is unknown"),
        ({"size": [500, 500]}, r"export.size=\[500, 500\]: give multiples of the patches' 8 px, such as \[496, 496\]"),
        ({"size": [512]}, r"give \[H,W\]"),
        ({"size": [64, 64], "dynamic": True}, "is one size: leave it out"),
        ({"pixels": True, "dynamic": True}, "which takes one size"),
        ({"tensorrt": True}, "neither trtexec nor the Python package"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_traced(cfg, out, monkeypatch, words, reason):
    monkeypatch.setattr(onnx_export, "trace", lambda *_: pytest.fail("it was traced"))
    with pytest.raises(UserError, match=reason):
        export_onnx(cfg, out_dir=out, **words)
    assert not list(out.iterdir())


def test_nan_which_agrees_with_anything_proves_nothing(tmp_path):
    write_data(tmp_path / "data")
    path = tmp_path / "data/val/images/0.png"
    nothing = SimpleNamespace(
        ids=lambda images: np.zeros((1, 32, 48), np.uint8), probabilities=lambda images: np.full((1, 2, 32, 48), np.nan)
    )
    with pytest.raises(UserError, match=r"0.png: the trained model's own probabilities are NaN"):
        proof.compare(nothing, lambda *_: pytest.fail("it was asked"), [Picture(path, None)], 2, 255)


def test_an_engine_is_built_by_what_is_there(tmp_path, monkeypatch):
    record = SimpleNamespace(size=None, batch=None, multiple=16)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"onnx")
    command = tmp_path / "trtexec"
    command.write_text('#!/bin/sh\nfor word; do case $word in --saveEngine=*) echo "$@" > "${word#*=}";; esac; done\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    words = tensorrt.build_engine(path, record).read_text()
    assert f"--onnx={path}" in words and "--maxShapes=image:8x3x1024x1024" in words
    command.write_text("#!/bin/sh\necho no GPU here >&2\nexit 1\n")
    with pytest.raises(UserError, match="it says: no GPU here"):
        tensorrt.build_engine(path, record)
    assert (tmp_path / "model.engine").read_text() == words  # of before


@pytest.mark.heavy
def test_weights_beside_a_large_file_are_read_from_there(cfg, out, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    export_onnx(cfg, out_dir=out)
    assert sorted(path.name for path in out.iterdir()) == [REPORT, "model.onnx", "model.onnx.data"]
    assert dinoseg.load(out / "model.onnx").predict(out.parent / "data/val/images/0.png").mask.shape == (32, 48)


@pytest.mark.heavy
def test_lora_updates_are_merged_and_a_program_is_proven_too(compose, tmp_path):
    write_data(tmp_path / "data")
    path = untrained(compose, tmp_path, *TINY, "head=linear", "adapter=lora", "adapter.rank=2")
    cfg = alone(path, checkpoint.describe(path), {"engine.device": "cpu"})
    (tmp_path / "out").mkdir()
    export_program(cfg, out_dir=tmp_path / "out", images=str(tmp_path / "data/val/images"))
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["proven"] and report["references"] == "the trained model's own classes"
    assert not [name for name in torch.export.load(tmp_path / "out/model.pt2").state_dict if "lora" in name]
