"""Models that go to a hub and come back: a fake one in a folder, and none that answers."""

import re
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
from mistakes import assert_refused
from portable_parts import TINY, export_file, graph_with_weights, write_untrained

import dinoseg
from dinoseg import Model
from dinoseg.extensions.export.onnx_model import ONNX_WEIGHTS, OnnxModel
from dinoseg.segmenter.facts import ModelFacts
from dinoseg.segmenter.hub import fetch_model_file, model_card
from dinoseg.utils.errors import UserError

TOKEN = "hf_nobody_may_read_this"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repositories are folders; it notes what it was asked."""
    asked = []

    class Api:
        def __init__(self, token=None):
            asked.append({"token": token})

        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            asked.append({"create": repo_id, "private": private})

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{revision}")

    def snapshot(repo_id, revision, token, allow_patterns):
        asked.append({"fetched": repo_id, "revision": revision, "token": token, "patterns": allow_patterns})
        return str(tmp_path / "hub" / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return SimpleNamespace(folder=tmp_path / "hub", asked=asked)


@pytest.fixture(scope="module")
def file(compose, tmp_path_factory):
    folder = tmp_path_factory.mktemp("file")
    return export_file(write_untrained(compose, folder, *TINY, "adapter=full", "head=linear"), folder / "out")


def test_a_model_comes_back_from_the_hub(hub, file):
    model = dinoseg.load(file, device="cpu")
    address = model.push_to_hub("me/mine", private=True, revision="draft", token=TOKEN)
    assert address == "https://hub/me/mine/commit/draft" and {"create": "me/mine", "private": True} in hub.asked
    assert {path.name for path in (hub.folder / "me/mine").iterdir()} == {"README.md", "model.safetensors"}
    back = Model.from_pretrained("me/mine", revision="draft", token=TOKEN, device="cpu")
    assert {"token": TOKEN} in hub.asked and hub.asked[-1]["token"] == TOKEN
    assert hub.asked[-1]["revision"] == "draft" and hub.asked[-1]["patterns"][0] == "model.safetensors*"
    image = np.random.default_rng(0).integers(0, 256, (30, 41, 3)).astype(np.uint8)
    assert (back.predict(image).probabilities == model.predict(image).probabilities).all()
    assert back.facts == model.facts == Model.from_pretrained(hub.folder / "me/mine", device="cpu").facts
    assert not any(TOKEN.encode() in path.read_bytes() for path in hub.folder.rglob("*") if path.is_file())


def test_gated_weights_are_not_uploaded_by_default(hub, file):
    model = dinoseg.load(file, device="cpu")
    of_meta = {**model.facts.backbone, "licence": "DINOv3 License", "gated": True}
    model.facts = replace(model.facts, backbone=of_meta)
    assert_refused(lambda: model.push_to_hub("me/mine"), "DINOv3 License", "delta=True", "gated=True")
    assert not hub.asked
    model.push_to_hub("me/mine", gated=True)


def test_hub_failure_is_one_message_without_the_token(file, monkeypatch):
    model = dinoseg.load(file, device="cpu")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")

    def fail(token):
        raise RuntimeError(f"{token} is not valid")

    for ask in (model.push_to_hub, Model.from_pretrained):
        told = assert_refused(partial(ask, "me/mine", token=TOKEN), "me/mine: the hub request failed", "hf auth login")
        assert TOKEN not in told
    monkeypatch.setattr(huggingface_hub, "HfApi", fail)
    with pytest.raises(UserError, match="RuntimeError: ... is not valid") as refused:
        model.push_to_hub("me/mine", token=TOKEN)
    assert TOKEN not in str(refused.value) and refused.value.__cause__ is None


def test_a_place_without_a_model_is_refused(tmp_path, file):
    assert_refused(lambda: Model.from_pretrained(tmp_path), "holds no model.safetensors")
    assert_refused(lambda: Model.from_pretrained(file), "read a local file with dinoseg.load")


def test_model_card_has_scores_and_licence_and_escapes_markup():
    official = {"protocol": "IDD", "scores": {"miou": 0.5}, "ci95": {"miou": [0.4, 0.6]}, "n": 12, "unit": "image"}
    scores = {"split": "val", "protocol": "counted", "values": {"miou": 0.25}, "per_class": {"a|b": 0.125}}
    evil = "x</script><b>|y\n# head"
    backbone = {"name": "dinov3_vits16", "licence": "DINOv3 License\nmodel: evil", "weights": evil, "gated": True}
    scores |= {"official": official}
    facts = ModelFacts(("a|b", evil), ((1, 2, 3), (4, 5, 6)), 255, scores=scores, backbone=backbone, delta=True)
    card = model_card(facts, "me/mine")
    assert "| `miou` | 25.00 | - |" in card and "| `miou` | 50.00 | 40.00 .. 60.00 |" in card
    assert "over `12` units (`image`)" in card
    assert "| 0 | `a\\x7cb` | (1, 2, 3) | 12.50 |" in card
    assert "only the trained weights" in card and "restricts redistribution: `DINOv3 License" in card
    assert "<" not in card and "\n# head" not in card and "\nmodel:" not in card
    assert card.startswith('---\nlicense: other\nlicense_name: "DINOv3 License\\nmodel: evil"\n')
    assert "The file holds no scores" in model_card(ModelFacts(("a",), ((0, 0, 0),), 255), "me/mine")


@pytest.mark.parametrize(
    "name", ["http://evil.example", "www.evil.example", "a_b_ ~~c~~ **d**", "[a](b)", "`a` me@b.c", ""]
)
def test_names_in_the_card_are_spans_of_code(name):
    card = model_card(ModelFacts((name,), ((0, 0, 0),), 255), "me/mine")
    (line,) = [line for line in card.splitlines() if "| 0 |" in line]
    assert re.fullmatch(r"\| 0 \| `[^`|]+` \| \(0, 0, 0\) \| - \|", line)


def upload_onnx(path, name="me/mine", **facts):
    facts = ModelFacts(("a", "b"), ((0, 0, 0), (1, 2, 3)), 255, **facts)
    OnnxModel(SimpleNamespace(name="onnx"), facts, path).push_to_hub(name)


def test_model_card_omits_invalid_numbers_and_control_codes():
    scores = {"values": {"miou": 10**400, "dice": float("nan")}, "per_class": [1]}
    facts = ModelFacts(("a",), ((0, 0, 0),), 255, scores=scores, backbone={"name": "\x1b[2J"})
    card = model_card(facts, "me/mine")
    assert "| `miou` | - | - |" in card and "| `dice` | - | - |" in card and "| 0 | `a` | (0, 0, 0) | - |" in card
    assert "\x1b" not in card + repr(Model(SimpleNamespace(name="onnx"), facts))


def test_external_weights_are_uploaded_with_their_graph(hub, tmp_path):
    for file, weights in (("model.onnx", ONNX_WEIGHTS), ("renamed.onnx", ONNX_WEIGHTS), ("bare.onnx", None)):
        graph_with_weights(tmp_path, weights, name=file)
        upload_onnx(tmp_path / file, f"me/{file}")
        expected = {"model.onnx", "README.md"} | ({weights} if weights else set())
        assert {path.name for path in (hub.folder / "me" / file).iterdir()} == expected
        assert (hub.folder / "me" / file / "model.onnx").read_bytes() == (tmp_path / file).read_bytes()
    assert fetch_model_file("me/model.onnx", runtime="onnx").name == "model.onnx"
    assert hub.asked[-1]["patterns"] == ["model.onnx*"]
    assert_refused(lambda: upload_onnx(tmp_path / "bare.onnx", backbone={"gated": True}), "gated=True")
    upload_onnx(tmp_path / "bare.onnx", backbone={"gated": True, "in_file": False})
