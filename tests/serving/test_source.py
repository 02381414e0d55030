"""A model in one file is served as it says; a delta is given its backbone from the command line."""

import pytest
from command_line import call
from portable_parts import export_file, write_untrained

from dinoseg.experiment.builder import Builder
from dinoseg.utils.tensor_files import write_tensors


@pytest.fixture
def start_mode(monkeypatch):
    """Return a function that starts and stops a mode, and says what it wrote."""
    for mode in ("serve", "app"):
        monkeypatch.setattr(f"dinoseg.modes.{mode}.serve_until_signal", lambda *_, **__: None)
    return lambda where, mode, *words: call(where, f"mode={mode}", "engine=cpu", "mode.port=0", *words)


@pytest.mark.heavy
def test_a_delta_is_given_its_backbone_from_the_command_line(compose, tmp_path, start_mode):
    weights, moved = tmp_path / "backbone.safetensors", tmp_path / "moved.safetensors"
    backbone = Builder(compose("backbone=tiny_surgical", "data.classes=[a]")).backbone()
    write_tensors(weights, backbone.export_state(), {})
    words = ("backbone=tiny_surgical", f"backbone.weights={weights}", "adapter=frozen", "head=linear")
    delta = export_file(write_untrained(compose, tmp_path, *words), tmp_path / "out", delta=True, gated=True)
    weights.rename(moved)
    for mode in ("serve", "app"):
        done = start_mode(tmp_path, mode, f"mode.model={delta}")
        assert done.status == 1 and "resume=" not in done.err
        assert f"mode.model={delta}: " in done.err and "Set its current path: backbone.weights=PATH." in done.err
        done = start_mode(tmp_path, mode, f"mode.model={delta}", f"backbone.weights={moved}")
        assert done.status == 0, done.err
    done = start_mode(tmp_path, "serve", f"resume={delta}", f"backbone.weights={moved}")
    assert done.status == 0, done.err
    done = start_mode(tmp_path, "serve", f"mode.model={delta}", f"backbone.weights={moved}", "inference=windows")
    assert (
        done.status == 0 and ("No effect here: inference=windows. mode.model uses its stored settings") in done.err
    ), done.err


def test_unsupported_option_of_an_onnx_file_is_refused_unread(tmp_path, start_mode):
    (tmp_path / "model.onnx").touch()
    for word in ("engine.precision=bf16", "backbone.weights=x"):
        done = start_mode(tmp_path, "serve", "mode.model=model.onnx", word)
        assert done.status == 1 and f"{word}: model.onnx is an ONNX file" in done.err, done.err
