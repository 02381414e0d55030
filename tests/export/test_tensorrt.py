"""TensorRT as its documentation has it: no real one was there to be asked.

Names, arguments and failures are those of NVIDIA's Python API reference and of the bindings' source (TensorRT 10).
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from dinoseg.export import onnx_export
from dinoseg.utils.errors import UserError

OPEN = SimpleNamespace(size=None, batch=None, multiple=16)
SIZES = [(480, 368), (240, 1280)]


class Fake(ModuleType):
    """The module `tensorrt`: its calls noted in order, its answers those that a test sets."""

    def __init__(self, parses=True, errors=("Unsupported op",), index=0, engine=b"engine", gpu=True):
        super().__init__("tensorrt")
        self.calls, calls = [], None
        calls, fake = self.calls, self

        class Logger:
            WARNING = "WARNING"

            def __init__(self, min_severity):
                calls.append(("log", min_severity))

        class Profile:
            def set_shape(self, input, min, opt, max):
                if not all(low <= best <= high for low, best, high in zip(min, opt, max, strict=True)):
                    raise RuntimeError("Shape provided for opt is inconsistent with other shapes.")
                self.shapes = {input: (min, opt, max)}

        class Config:
            profiles = ()

            def add_optimization_profile(self, profile):
                self.profiles = (profile,)
                return index

        class Builder:
            def __init__(self, logger):
                assert isinstance(logger, Logger)
                if not gpu:  # as pybind11 says it
                    raise TypeError("pybind11::init(): factory function returned nullptr")

            def create_network(self, flags=0):
                calls.append(("network", flags))
                return "network"

            def create_builder_config(self):
                return Config()

            def create_optimization_profile(self):
                return Profile()

            def build_serialized_network(self, network, config):
                calls.append(("build", network, [profile.shapes for profile in config.profiles]))
                return None if engine is None else memoryview(engine)

        class OnnxParser:
            num_errors = 0

            def __init__(self, network, logger):
                assert network == "network" and isinstance(logger, Logger)

            def parse_from_file(self, model):
                assert isinstance(model, str)
                calls.append(("parse", model))
                self.num_errors = 0 if parses else len(errors)
                return parses

            def get_error(self, index):
                assert 0 <= index < self.num_errors
                return SimpleNamespace(desc=lambda: errors[index])

        fake.Logger, fake.Builder, fake.OnnxParser = Logger, Builder, OnnxParser


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Return an ONNX file on a machine without trtexec."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: name == "tensorrt" and object())
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    return tmp_path / "model.onnx"


def build(monkeypatch, path, record=OPEN, **answers):
    """Build an engine by the fake package; return it and its calls."""
    monkeypatch.setitem(sys.modules, "tensorrt", fake := Fake(**answers))
    return onnx_export.build_engine(path, record, SIZES), fake.calls


def test_the_package_is_asked_as_its_reference_says(path, monkeypatch):
    engine, calls = build(monkeypatch, path)
    assert engine == path.with_suffix(".engine") and engine.read_bytes() == b"engine"
    shapes = ((1, 3, 240, 240), (1, 3, 480, 368), (8, 3, 1280, 1280))
    assert calls == [
        *(("log", "WARNING"), ("network", 0), ("parse", str(path))),
        ("build", "network", [{"image": shapes}]),
    ]
    fixed = SimpleNamespace(size=(48, 64), batch=2, multiple=16)
    assert build(monkeypatch, path, fixed)[1][-1] == ("build", "network", [])  # no size is open
    assert onnx_export.shapes(fixed, SIZES) == [(2, 3, 48, 64)]
    assert onnx_export.shapes(OPEN, [(16, 32)]) == [(1, 3, 16, 16), (1, 3, 16, 32), (8, 3, 1024, 1024)]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"parses": False}, r"cannot read .*model.onnx \(Unsupported op\)"),
        ({"parses": False, "errors": ("one", "two")}, r"\(one; two\)"),
        ({"parses": False, "errors": ()}, r"\(no reason\)"),
        ({"index": -1}, r"does not accept the sizes \[\(1, 3, 240, 240\)"),
        ({"engine": None}, "could not build an engine from .*model.onnx. The ONNX file is verified and saved"),
        ({"gpu": False}, "could not build an engine from .*factory function returned nullptr"),
    ],
)
def test_what_the_package_refuses_is_told_and_nothing_of_it_stays(path, monkeypatch, answers, reason):
    with pytest.raises(UserError, match=reason):
        build(monkeypatch, path, **answers)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


def test_a_package_whose_libraries_are_missing_is_told(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as where libnvinfer cannot be loaded
    with pytest.raises(UserError, match="could not build an engine"):
        onnx_export.build_engine(path, OPEN, SIZES)


def test_the_command_comes_first_and_an_engine_of_before_outlives_its_failure(path, monkeypatch):
    command = path.with_name("trtexec")
    command.write_text('#!/bin/sh\nfor word; do case $word in --saveEngine=*) echo "$@" > "${word#*=}";; esac; done\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    words = onnx_export.build_engine(path, OPEN, SIZES).read_text().split()
    assert words[0] == f"--onnx={path}" and "--skipInference" in words
    assert words[-3:] == [
        *("--minShapes=image:1x3x240x240", "--optShapes=image:1x3x480x368", "--maxShapes=image:8x3x1280x1280")
    ]
    command.write_text("#!/bin/sh\necho no GPU here >&2\nexit 1\n")
    with pytest.raises(UserError, match="no GPU here.*The ONNX file is verified and saved"):
        onnx_export.build_engine(path, OPEN, SIZES)
    assert path.with_suffix(".engine").read_text().split() == words
    command.write_text("#!/bin/sh\n")  # ends well, and writes nothing
    with pytest.raises(UserError, match=r"\(nothing\)"):
        onnx_export.build_engine(path, OPEN, SIZES)
