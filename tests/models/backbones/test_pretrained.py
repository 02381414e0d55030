"""Files of whole models and of models that end with the last block that is read."""

import json
import logging
import re
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from mistakes import assert_refused
from safetensors.torch import save_file
from transformers.utils import logging as their_logging

from dinoseg.models.backbones.convnext import ConvNext
from dinoseg.models.backbones.meta_weights import FAMILIES, INV_FREQ
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.utils.errors import UserError

SMALL = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 16}
STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 12, 16, 24], "drop_path_rate": 0.2}
KINDS = [*FAMILIES, "convnext"]
QUICK = ("dinov3_vit", "convnext")  # one of each class


def build(kind, last, weights="random"):
    if kind == "convnext":
        return ConvNext(STAGES, str(weights), 4 * 2**last, [last]).eval()
    return TransformersVit(kind, SMALL, str(weights), 8, [last]).eval()


def shaken(kind, last):
    torch.manual_seed(0)
    backbone = build(kind, last)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone


def in_block(kind, number, state):
    """Return the names of the weights in a block, matrices first."""
    part = f"stages.{number}." if kind == "convnext" else f"layer.{number}."
    return sorted((key for key in state if part in key), key=lambda key: not key.endswith("weight"))


@pytest.fixture(params=[pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.heavy]) for kind in KINDS])
def kind(request):
    return request.param


def test_a_whole_file_and_a_cut_one_give_the_same_cut_model(tmp_path, kind):
    whole = shaken(kind, 3)
    cut = build(kind, 1)
    cut.load_state_dict({key: value for key, value in whole.state_dict().items() if key in cut.state_dict()})
    save_file(whole.export_state(), tmp_path / "whole.safetensors")
    save_file(cut.export_state(), tmp_path / "cut.safetensors")
    cut.model.save_pretrained(tmp_path / "folder")
    images = torch.rand(1, 3, 20, 30)
    for source in ("whole.safetensors", "cut.safetensors", "folder"):
        again = build(kind, 1, tmp_path / source)
        assert len(again.blocks) == 2 and again.state_dict().keys() == cut.state_dict().keys()
        assert torch.equal(again(images)[0], cut(images)[0])


def test_every_other_file_is_refused(tmp_path, kind):
    file = tmp_path / "w.safetensors"
    whole = shaken(kind, 3).export_state()
    cut = shaken(kind, 1).export_state()
    (kept, *_), (gone, *_) = in_block(kind, 1, cut), in_block(kind, 3, whole)
    for name, state, last in (
        ("a cut file for a whole model", cut, 3),
        ("a cut file for a model cut later", cut, 2),
        ("a cut file for a model cut earlier", cut, 0),
        ("one tensor too few", {key: value for key, value in cut.items() if key != kept}, 1),
        ("one too few after the cut", {key: value for key, value in whole.items() if key != gone}, 1),
        ("one block too many", cut | {key: whole[key] for key in in_block(kind, 2, whole)}, 1),
        ("one tensor too many", cut | {"extra": torch.zeros(1)}, 1),
        ("another shape", cut | {kept: torch.zeros(7)}, 1),
        ("another shape after the cut", whole | {gone: torch.zeros(7)}, 1),
    ):
        save_file(state, file)
        with pytest.raises(UserError, match=r"w\.safetensors: \d+ tensors are missing, unexpected or of another shape"):
            build(kind, last, file)
            pytest.fail(name)


@pytest.mark.parametrize("bars", [True, False])
def test_transformers_is_silent_only_while_loading(tmp_path, capfd, bars):
    save_file(shaken("dinov3_vit", 1).export_state(), tmp_path / "cut.safetensors")
    seen = []
    handler = logging.Handler()
    handler.emit = seen.append
    theirs = their_logging.get_logger()
    theirs.addHandler(handler)
    before = their_logging.get_verbosity()
    (their_logging.enable_progress_bar if bars else their_logging.disable_progress_bar)()
    try:
        build("dinov3_vit", 1, tmp_path / "cut.safetensors")
        with pytest.raises(UserError, match="tensors are missing"):
            build("dinov3_vit", 3, tmp_path / "cut.safetensors")
        assert their_logging.get_verbosity() == before and their_logging.is_progress_bar_enabled() == bars
    finally:
        theirs.removeHandler(handler)
        their_logging.enable_progress_bar()
    assert not seen and capfd.readouterr() == ("", "")


def spoilt(value, fault):
    if fault == "int8":
        return (100 * value).to(torch.int8)
    return torch.cat([value.flatten()[:-1], torch.tensor([float(fault)])]).view_as(value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("int8", "is int8"),
        ("nan", "holds NaN or infinity"),
        pytest.param("-inf", "holds NaN or infinity", marks=pytest.mark.heavy),
    ],
)
def test_weights_that_are_not_finite_floats_are_refused_by_name(tmp_path, monkeypatch, kind, fault, said):
    state = shaken(kind, 1).export_state()
    name = in_block(kind, 1, state)[0]
    state[name] = spoilt(state[name], fault)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    torch.save(state, tmp_path / "w.pth")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))  # tests are without a hub
    for source in (tmp_path / "model.safetensors", tmp_path / "w.pth", tmp_path, "some/body"):
        # transformers names some tensors otherwise than the files of the hub
        named = r"\S+" if source in (tmp_path, "some/body") else re.escape(name)
        with pytest.raises(UserError, match=rf"^weights={source}: (model.safetensors: )?{named} {said}"):
            build(kind, 1, source)


def test_the_files_that_are_loaded_are_checked_and_no_others(tmp_path):
    state = shaken("vit", 1).export_state()
    name = in_block("vit", 1, state)[0]
    spoilt_state = state | {name: spoilt(state[name], "int8")}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    save_file(spoilt_state, tmp_path / "model_int8.safetensors", {"format": "pt"})
    build("vit", 1, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1-of-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-1-of-1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    build("vit", 1, tmp_path)
    for content in ("{}", "none", '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        assert_refused(lambda: build("vit", 1, tmp_path), "model.safetensors.index.json cannot be read")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(spoilt_state, tmp_path / "model-1-of-1.safetensors", {"format": "pt"})
    assert_refused(lambda: build("vit", 1, tmp_path), f"model-1-of-1.safetensors: {name} is int8")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert_refused(lambda: build("vit", 1, tmp_path), "the weights cannot be downloaded")


def test_weights_fetched_from_the_hub_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--body" / "snapshots" / ("01" * 20)
    folder.mkdir(parents=True)
    (tmp_path / "models--some--body" / "refs").mkdir()
    (tmp_path / "models--some--body" / "refs" / "main").write_text(folder.name)
    state = shaken("vit", 1).export_state()
    name = in_block("vit", 1, state)[0]
    save_file(state | {name: spoilt(state[name], "int8")}, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=None))
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: (shaken("vit", 1).model, {}))
    assert_refused(lambda: build("vit", 1, "some/body"), f"some/body: model.safetensors: {name} is int8")


def test_frequencies_of_other_heads_are_refused(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(shaken("dinov3_vit", 1).export_state() | {INV_FREQ: torch.ones(1)}, file)
    assert_refused(lambda: build("dinov3_vit", 1, file), "w.safetensors: ", "a model with 6 heads", "has 3")
